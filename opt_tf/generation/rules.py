"""The rules that change a step's scores before a token is chosen, and their chain, in float64."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow import Tensor

from opt_core import arguments
from opt_core.generation import ORDER, allowed_tokens
from opt_tf.generation import cuts

if TYPE_CHECKING:
    from opt_tf.generation.setup import Told

#: What the active rules take, by their names: which are there is the structure of a program.
Rules = Mapping[str, tuple[Tensor, ...]]

#: A function of the caller's: see `generate`.
Function = Callable[..., Any]


class Functions(NamedTuple):
    """The functions of a call, which a program is made with."""

    allowed: Function | None = None
    processors: tuple[Function, ...] = ()
    criteria: tuple[Function, ...] = ()


class _Same:
    """A function by its identity: not every callable has a hash."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def __hash__(self) -> int:
        return id(self.function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.function is self.function


def known_by(function: Function) -> Hashable:
    """What a function is known by; methods of one object are equal, though not the same."""
    return function if isinstance(function, Hashable) else _Same(function)


def keyed(functions: Functions) -> tuple[Hashable, ...]:
    """What the functions of a call are known by."""
    allowed = () if functions.allowed is None else (functions.allowed,)
    each = (allowed, functions.processors, functions.criteria)
    return tuple(tuple(map(known_by, some)) for some in each)


class Text(NamedTuple):
    """What rules look at: N texts, `copies` (beams) of each row that was asked for."""

    #: int32 [N, W]: real tokens alone, moved up to the first choice; -1 where there is none.
    tokens: Tensor
    #: int32 [N, W]: as it was given and is returned, for the functions of a call.
    written: Tensor
    #: int32 []: how many columns are settled.
    length: Tensor
    #: int32 []: how many of `written`.
    shown: Tensor
    copies: int = 1
    #: float64 [B, 1, V]: how often earlier groups of beams chose each token in this step.
    taken: Tensor | None = None


def text_of(tokens: Tensor, length: Tensor, told: Told, copies: int = 1) -> Text:
    """What rules look at of texts `[N, W]`; `copies` of each text that was asked for."""
    prompt = told.written if copies == 1 else tf.repeat(told.written, copies, axis=0)
    settled = tf.range(tokens.shape[1])
    text = tf.where(settled < told.start, prompt, tokens)
    seen, shown = tf.where(settled < length, tokens, -1), length
    if told.hidden is not None:
        text, shown = tf.roll(text, -told.hidden, axis=1), length - told.hidden
    return Text(seen, text, length, shown, copies)


def guided(scores: Tensor, told: Told) -> Tensor:
    """`[R, V]` -> `[B, V]`: with guidance, away from what is likely without the prompt."""
    if told.guidance is None:
        return scores
    logarithms = cuts.log_probabilities(tf.cast(scores, tf.float64))
    asked, unasked = tf.split(logarithms, 2)
    return told.guidance * (asked - unasked) + unasked


def ruled(scores: Tensor, text: Text, rules: Rules, functions: Functions) -> Tensor:
    """The scores after the active rules, in their order: `[N, V]` -> `[N, V]`.

    A rule takes a token out of the choice by -inf. What each means stands in
    `opt_core.reference`. Scores are float64 unless nothing but the vocabulary's end is asked for.
    """
    if len(rules) > 1 or functions.allowed or functions.processors:
        scores = tf.cast(scores, tf.float64)
    part: list[str] = []
    for name in ORDER:
        if name == "prefix_allowed_tokens_fn" and functions.allowed:
            scores = _chain(scores, text, rules, part)
            scores, part = _allowed(scores, text, functions.allowed), []
        elif name == "logits_processor" and functions.processors:
            scores, part = _chain(scores, text, rules, part), []
            for processor in functions.processors:
                scores = _processed(scores, text, processor)
        elif name in rules:
            part.append(name)
    return _chain(scores, text, rules, part)


def _chain(scores: Tensor, text: Text, rules: Rules, names: list[str]) -> Tensor:
    """Some of the rules; a program of their own where nothing around them is compiled."""
    given = {name: rules[name] for name in names}
    return _PIECE(scores, text, given) if tf.executing_eagerly() else _applied(scores, text, given)


def _applied(scores: Tensor, text: Text, rules: Rules) -> Tensor:
    for name in ORDER:
        if name in rules:
            scores = RULES[name](scores, text, *rules[name])
    return scores


_PIECE = tf.function(_applied, autograph=False)


def without(dropped: Tensor, scores: Tensor) -> Tensor:
    """`[N, V]` with tokens taken out of the choice."""
    return tf.where(dropped, tf.constant(-np.inf, scores.dtype), scores)


def vocabulary(scores: Tensor, text: Text, known: Tensor) -> Tensor:
    """Leave the ids below `known`."""
    return without(tf.range(scores.shape[1]) >= known, scores)


def sequence_bias(scores: Tensor, text: Text, ids: Tensor, values: Tensor) -> Tensor:
    """Add to the last id of each sequence `[n, L]` where the text ends with those before it."""
    before, last = ids[:, :-1], ids[:, -1]
    ending = _latest(text, before.shape[1])[:, None]  # [N, 1, L - 1]
    is_met = tf.reduce_all((before < 0) | (before == ending), axis=2)  # [N, n]
    added = tf.where(is_met, values, tf.zeros_like(values))
    return scores + _scattered(tf.broadcast_to(last, is_met.shape), added, scores.shape[1])


def diversity_penalty(scores: Tensor, text: Text, penalty: Tensor) -> Tensor:
    """Make what earlier groups of beams chose in this step less likely (1610.02424)."""
    if text.taken is None:
        return scores
    each = tf.reshape(scores, (-1, text.copies, scores.shape[1])) - penalty * text.taken
    return tf.reshape(each, scores.shape)


def repetition_penalty(scores: Tensor, text: Text, penalty: Tensor) -> Tensor:
    """Make the tokens that a text holds less likely (1909.05858)."""
    seen = _scattered(text.tokens, tf.ones_like(text.tokens), scores.shape[1]) > 0
    return tf.where(seen, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram_size(scores: Tensor, text: Text, n: Tensor) -> Tensor:
    """Take out what would end a sequence of `n` tokens that the text holds already."""
    tokens = text.tokens
    N, W = tokens.shape

    def compare(back: Tensor, is_same: Tensor) -> tuple[Tensor, Tensor]:
        # Whether the token this far before a column is the one this far before the next choice.
        earlier = tf.where(tf.range(W) >= back, tf.roll(tokens, back, axis=1), -1)
        latest = tf.gather(tokens, tf.maximum(text.length - back, 0), axis=1)[:, None]
        # A text of fewer tokens ends with no such sequence.
        return back + 1, is_same & (earlier == latest) & (latest >= 0)

    start = (tf.constant(1), tf.ones((N, W), tf.bool))
    _, ends_one = tf.while_loop(lambda back, _: back < n, compare, start)
    columns = tf.where(ends_one, tokens, -1)
    return without(_scattered(columns, tf.ones_like(tokens), scores.shape[1]) > 0, scores)


def min_new_tokens(scores: Tensor, text: Text, stops: Tensor, least: Tensor) -> Tensor:
    """Take the stop tokens out until column `least`."""
    return without(stops & (text.length < least), scores)


def forced_bos_token_id(scores: Tensor, text: Text, token: Tensor) -> Tensor:
    """Leave one token where a text has a single one so far."""
    is_first = _count(text) == 1
    return tf.where(is_first[:, None], _alone(scores, tf.range(scores.shape[1]) == token), scores)


def forced_eos_token_id(scores: Tensor, text: Text, tokens: Tensor, last: Tensor) -> Tensor:
    """Leave these tokens alone in the last column."""
    return tf.where(text.length == last, _alone(scores, tokens), scores)


def remove_invalid_values(scores: Tensor, text: Text) -> Tensor:
    """Numbers in place of NaN and the infinities: 0, and the ends of float32."""
    ends = tf.constant((tf.float32.min, tf.float32.max), scores.dtype)
    scores = tf.where(tf.math.is_nan(scores), tf.zeros_like(scores), scores)
    return tf.where(tf.math.is_inf(scores), tf.where(scores < 0, ends[0], ends[1]), scores)


def exponential_decay_length_penalty(
    scores: Tensor, text: Text, stops: Tensor, start: Tensor, factor: Tensor
) -> Tensor:
    """Make stop tokens the likelier the longer a text is past `start`."""
    past = text.length - start
    # A score of 0 stays one, however large the power.
    grown = tf.math.multiply_no_nan(factor ** tf.cast(past, scores.dtype) - 1, tf.abs(scores))
    # What may not be chosen stays so: -inf, or its number under `remove_invalid_values`. From inf
    # would come NaN.
    lowest = tf.constant(tf.float32.min, scores.dtype)
    may_grow = (scores > lowest) & tf.math.is_finite(scores)
    return tf.where(stops & (past > 0) & may_grow, scores + grown, scores)


def suppress_tokens(scores: Tensor, text: Text, tokens: Tensor) -> Tensor:
    """Take tokens out."""
    return without(tokens, scores)


def begin_suppress_tokens(
    scores: Tensor, text: Text, tokens: Tensor, begin: Tensor, is_forced: Tensor
) -> Tensor:
    """Take tokens out of the first choice, or of the second where the first was forced."""
    single = _count(text) - (text.length - begin) == 1
    first = begin + tf.cast(is_forced & single, tf.int32)  # [N]
    return without(tokens & (text.length == first)[:, None], scores)


#: Every rule by its name; which arrays it takes stands in `opt_core.generation.chain`.
RULES: Mapping[str, Callable[..., Tensor]] = {
    "vocabulary": vocabulary,
    "sequence_bias": sequence_bias,
    "diversity_penalty": diversity_penalty,
    "repetition_penalty": repetition_penalty,
    "no_repeat_ngram_size": no_repeat_ngram_size,
    "bad_words_ids": sequence_bias,
    "min_new_tokens": min_new_tokens,
    "forced_bos_token_id": forced_bos_token_id,
    "forced_eos_token_id": forced_eos_token_id,
    "remove_invalid_values": remove_invalid_values,
    "exponential_decay_length_penalty": exponential_decay_length_penalty,
    "suppress_tokens": suppress_tokens,
    "begin_suppress_tokens": begin_suppress_tokens,
    "temperature": lambda scores, _, value: scores / value,
    "top_k": lambda scores, _, count: cuts.top_k(scores, count),
    "top_p": lambda scores, _, mass, kept: cuts.top_p(scores, mass, kept),
    "min_p": lambda scores, _, share, kept: cuts.min_p(scores, share, kept),
    "typical_p": lambda scores, _, mass, kept: cuts.typical_p(scores, mass, kept),
    "epsilon_cutoff": lambda scores, _, least, kept: cuts.epsilon_cutoff(scores, least, kept),
    "eta_cutoff": lambda scores, _, least, kept: cuts.eta_cutoff(scores, least, kept),
    "renormalize_logits": lambda scores, _: cuts.log_probabilities(scores),
}


# --- functions of the caller -------------------------------------------------------------------


def is_met(criterion: Function, text: Text, scores: Tensor) -> Tensor:
    """Whether a criterion ends each text: bool `[N]`.

    Raises:
        ValueError: it gave something else.
    """
    N = text.tokens.shape[0]
    found = _array(criterion, "stopping criterion", called(criterion, text, scores), (), (N,))
    return tf.broadcast_to(tf.cast(found, tf.bool), (N,))


def called(function: Function, text: Text, *scores: Tensor) -> Any:
    """What a function of texts and scores gives; see `generate` for what it is given."""
    if takes_length(function):
        return function(text.written, *scores, text.shown)
    return function(text.written[:, : text.shown], *scores)


def takes_length(function: Function) -> bool:
    """Whether a function takes a third argument, the length, and so can be traced."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    places = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in places for parameter in parameters) >= 3


def _processed(scores: Tensor, text: Text, processor: Function) -> Tensor:
    found = called(processor, text, tf.cast(scores, tf.float32))
    return tf.cast(_array(processor, "logits processor", found, tuple(scores.shape)), scores.dtype)


def _array(function: Function, kind: str, found: Any, *allowed: tuple[int, ...]) -> Tensor:
    """What a function gave, as an array of numbers in one of the shapes."""
    try:
        array = tf.convert_to_tensor(found)
    except (TypeError, ValueError):
        array = tf.constant("")
    is_number = array.dtype.is_bool or array.dtype.is_integer or array.dtype.is_floating
    arguments.check_answer(function, kind, tuple(array.shape) if is_number else None, allowed)
    return array


def _allowed(scores: Tensor, text: Text, function: Function) -> Tensor:
    rows = tf.range(scores.shape[0]) // text.copies
    if tf.executing_eagerly():
        each = zip(rows.numpy().tolist(), text.written, strict=True)
        kept = [_kept(function, row, ids, text.shown, scores.shape[1]) for row, ids in each]
        return without(~tf.constant(np.stack(kept)), scores)

    def one(row: tuple[Tensor, Tensor]) -> Tensor:
        return tf.convert_to_tensor(function(*row, text.shown))

    kept = tf.map_fn(one, (rows, text.written), fn_output_signature=tf.bool)
    return without(~kept, scores)


def _kept(function: Function, row: int, ids: Tensor, shown: Tensor, V: int) -> NDArray[np.bool_]:
    """Which tokens a function allows after a text: bool `[V]`."""
    given = (tf.constant(row), ids, shown) if takes_length(function) else (row, ids[:shown])
    return allowed_tokens(function, row, function(*given), V)


def all_traced(functions: Functions, rows: int, W: int, V: int, compiled: bool) -> bool:
    """Whether every function of a call can be a part of a program of `[rows, W]` texts."""
    text, length = tf.TensorSpec((rows, W), tf.int32), tf.TensorSpec((), tf.int32)
    scores = tf.TensorSpec((rows, V), tf.float32)
    of_scores = [
        _traced(known_by(f), (text, scores, length), compiled) is not None
        for f in (*functions.processors, *functions.criteria)
    ]
    if functions.allowed is not None:
        row = tf.TensorSpec((W,), tf.int32)
        found = _traced(known_by(functions.allowed), (length, row, length), compiled)
        of_scores.append(found == tf.TensorSpec((V,), tf.bool))
    return all(of_scores)


@lru_cache(64)
def _traced(known: Hashable, specs: tuple[tf.TensorSpec, ...], compiled: bool) -> Any:
    """What a function gives as a program, tried on nothing but zeros; None if it cannot be one."""
    function: Any = known.function if isinstance(known, _Same) else known
    if not takes_length(function):
        return None
    program: Callable[..., Any] = tf.function(function, jit_compile=compiled, autograph=False)
    try:
        return tf.type_spec_from_value(program(*(tf.zeros(s.shape, s.dtype) for s in specs)))
    except Exception:
        # Whatever it is, it will show again where the function runs on its own.
        return None


# --- looking at texts --------------------------------------------------------------------------


def after(table: Tensor, matched: Tensor, chosen: Tensor) -> Tensor:
    """The states of stop strings after tokens: ints of one shape -> int32 of that shape."""
    return tf.gather_nd(table, tf.stack([matched, chosen], axis=-1))


def _count(text: Text) -> Tensor:
    """The number of real tokens of each text: int32 `[N]`."""
    return tf.reduce_sum(tf.cast(text.tokens >= 0, tf.int32), axis=1)


def _latest(text: Text, count: int) -> Tensor:
    """The last `count` tokens of each text, -1 where there are not as many: int32 `[N, count]`."""
    columns = text.length - count + tf.range(count)
    found = tf.gather(text.tokens, tf.maximum(columns, 0), axis=1)
    return tf.where(columns >= 0, found, -1)


def _alone(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores `[V]` that leave some tokens alone."""
    return without(~tokens, tf.zeros(tokens.shape, scores.dtype))


def _scattered(ids: Tensor, values: Tensor, V: int) -> Tensor:
    """The sum of the values of each id: `[N, n]` twice -> `[N, V]`; an id of -1 is none."""
    N = ids.shape[0]
    columns = tf.where(ids >= 0, ids, V)
    places = tf.stack([tf.broadcast_to(tf.range(N)[:, None], columns.shape), columns], axis=-1)
    return tf.scatter_nd(places, values, (N, V + 1))[:, :V]
