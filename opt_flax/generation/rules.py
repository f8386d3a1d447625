"""The rules that change the scores of a step, up to the functions of a caller, and their chain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from opt_core import arguments
from opt_core.generation import ORDER, allowed_tokens
from opt_flax.attention import wide
from opt_flax.generation.cuts import CUTS

#: float64 holds the exponential of what is smaller.
_MOST_EXPONENT = 709.0
_LARGEST = float(np.finfo(np.float32).max)

#: What the active rules take, by their names: see `opt_core.generation.ORDER`.
Numbers = Mapping[str, tuple[Array, ...]]


class Text(NamedTuple):
    """What rules look at: n rows, B texts or the beams of B texts."""

    #: int32 [n, W]: the real tokens of every row; see `DecodeState`.
    tokens: Array
    #: int32 []: how many columns are settled.
    length: Array
    #: int32 [n]: the place of each row's text in the batch.
    places: Array
    #: int32 [n, W]: the prompt as given, then `tokens`; None where no function wants it.
    ids: Array | None
    #: float32 [n, V]: how many beams of earlier groups took each token in this step.
    taken: Array | None = None


@dataclass(frozen=True)
class Function:
    """A function of a caller: the same one where it is the same object."""

    call: Callable[..., Any] = field(compare=False)
    identity: int
    takes_length: bool
    #: It wants the columns settled alone, or cannot be traced: no program can hold it.
    on_host: bool = False

    def __call__(self, first: Any, second: Any, length: Array) -> Any:
        """With the columns settled, or with all of them and their number.

        The ids are the first argument of all but a `prefix_allowed_tokens_fn`, whose row comes
        before them.
        """
        if self.takes_length:
            return self.call(first, second, length)
        count = int(length)
        if np.ndim(first):
            return self.call(_columns(first, count), second)
        return self.call(first, _columns(second[None], count)[0])


class Functions(NamedTuple):
    """The functions of a call, which are a part of its programs."""

    prefix: Function | None = None
    processors: tuple[Function, ...] = ()
    criteria: tuple[Function, ...] = ()

    @property
    def all(self) -> tuple[Function, ...]:
        """Every one of them."""
        return (*((self.prefix,) if self.prefix else ()), *self.processors, *self.criteria)

    @property
    def on_host(self) -> bool:
        """Whether one of them cannot be a part of a program."""
        return any(function.on_host for function in self.all)


def functions_of(
    prefix: Callable[..., Any] | None,
    processors: Sequence[Callable[..., Any]] | None,
    criteria: Sequence[Callable[..., Any]] | None,
    *,
    scores: jax.ShapeDtypeStruct,
    texts: int,
    width: int,
) -> Functions:
    """A caller's functions, and where they can run.

    Processors see scores `[n, V]`, criteria so many texts of this width and scores of each.
    """
    rows, V = scores.shape

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def made(call: Callable[..., Any], allowed: Any, *shapes: Any) -> Function:
        function = Function(call, id(call), _takes_length(call))
        on_host = not function.takes_length or not _can_trace(call, (*shapes, array()), allowed)
        return replace(function, on_host=on_host)

    of_texts = jax.ShapeDtypeStruct((texts, V), scores.dtype)
    mask = jax.ShapeDtypeStruct((V,), np.bool_)
    return Functions(
        None if prefix is None else made(prefix, mask, array(), array(width)),
        tuple(made(one, None, array(rows, width), scores) for one in processors or ()),
        tuple(made(one, None, array(texts, width), of_texts) for one in criteria or ()),
    )


def _takes_length(call: Callable[..., Any]) -> bool:
    """Whether a third parameter has to be given: the number of columns."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return False
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([p for p in parameters if p.kind in by_place and p.default is p.empty]) == 3


def _can_trace(call: Callable[..., Any], shapes: tuple[Any, ...], allowed: Any) -> bool:
    """Whether it is traced without errors, and its answer is what is `allowed`, if anything.

    Errors of its own come again on the host.
    """
    try:
        found = jax.eval_shape(call, *shapes)
    except (TypeError, IndexError):
        return False
    is_array = isinstance(found, jax.ShapeDtypeStruct)
    return allowed is None or (is_array and (found.shape, found.dtype) == (allowed.shape, bool))


def chain(functions: Functions, scores: Array, text: Text, given: Numbers) -> Array:
    """The scores after all rules in their order, the functions' among them: `[n, V]` both ways."""
    names: list[str] = []
    for name in ORDER:
        calls: tuple[Function, ...] = ()
        if name == "prefix_allowed_tokens_fn" and functions.prefix:
            calls = (functions.prefix,)
        elif name == "logits_processor":
            calls = functions.processors
        elif name in given:
            names.append(name)
        if calls:
            scores, names = ruled(tuple(names), scores, text, given), []
            rule = _processed if name == "logits_processor" else _allowed
            for function in calls:
                scores = rule(function, scores, text)
    result: Array = ruled(tuple(names), scores, text, given)
    return result


@partial(jax.jit, static_argnums=0)
def ruled(names: tuple[str, ...], scores: Array, text: Text, given: Numbers) -> Array:
    """The scores after some rules, in float32 at least: `[n, V]` both ways."""
    scores, infinite = scores.astype(wide(scores.dtype)), None
    for name in names:
        if name == "temperature":
            # With draws. Cuts would hide that there is nothing to draw from.
            infinite = (scores == jnp.inf).any(1, keepdims=True)
        arrays = [
            jnp.asarray(x, scores.dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
            for x in given[name]
        ]
        scores = RULES[name](scores, text, *arrays)
    return scores if infinite is None else jnp.where(infinite, jnp.inf, scores)


def stopped(functions: Functions, ids: Array, scores: Array, length: Array) -> Array:
    """Which of the texts `[n, W]` a criterion stops, bool `[n]`."""
    result = jnp.zeros(len(ids), bool)
    for function in functions.criteria:
        said = function(ids, scores, length)
        said = _answer(function, "stopping criterion", said, ((), result.shape))
        result = result | jnp.broadcast_to(said.astype(bool), result.shape)
    return result


def agreement(tokens: Array, length: Array, most: Array) -> Array:
    """How many tokens before each column equal those that the text ends with: int32 `[n, W]`.

    Counted backwards from the column, at most `most`; 0 from column `length` on.
    """
    n, W = tokens.shape
    before = jnp.pad(tokens, ((0, 0), (W, 0)), constant_values=-1)

    def compare(back: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        count, equal = found
        last = lax.dynamic_index_in_dim(before, W + length - back, 1)  # [n, 1]
        earlier = lax.dynamic_slice_in_dim(before, W - back, W, axis=1)
        equal = equal & (earlier == last) & (last >= 0)
        return count + equal.astype(jnp.int32), equal

    is_past = jnp.arange(W, dtype=jnp.int32) < length
    start = (jnp.zeros((n, W), jnp.int32), jnp.broadcast_to(is_past[None], (n, W)))
    most = jnp.minimum(most, length)
    count: Array
    count, _ = lax.fori_loop(jnp.int32(1), most + 1, compare, start)
    return count


def _columns(ids: Any, count: int) -> Array:
    # By way of the host: a slice on the device is a program for each length.
    return jnp.asarray(np.asarray(ids)[:, :count])


def _allowed(function: Function, scores: Array, text: Text) -> Array:
    if function.on_host:
        allowed = jnp.asarray(_listed(function, scores.shape, text))
    else:
        allowed = jax.vmap(function, in_axes=(0, 0, None))(text.places, text.ids, text.length)
    return jnp.where(allowed, scores, -jnp.inf)


def _listed(function: Function, shape: tuple[int, ...], text: Text) -> NDArray[np.bool_]:
    """What a function on the host allows, row by row: lists of ids, or bool `[V]`."""
    assert text.ids is not None
    allowed = np.zeros(shape, np.bool_)
    for row, (place, ids) in enumerate(zip(np.asarray(text.places), text.ids, strict=True)):
        said = function(int(place), ids, text.length)
        allowed[row] = allowed_tokens(function.call, int(place), said, shape[1])
    return allowed


def _processed(function: Function, scores: Array, text: Text) -> Array:
    result = function(text.ids, scores, text.length)
    return _answer(function, "logits processor", result, (scores.shape,)).astype(scores.dtype)


def _answer(
    function: Function, kind: str, said: Any, allowed: tuple[tuple[int, ...], ...]
) -> Array:
    """What a function gave, as an array of one of these shapes."""
    found = None
    with suppress(TypeError, ValueError):
        found = jnp.asarray(said)
    arguments.check_answer(function.call, kind, None if found is None else found.shape, allowed)
    assert found is not None
    return found


def _vocabulary(scores: Array, text: Text, known: Array) -> Array:
    return jnp.where(_ids(scores) < known, scores, -jnp.inf)


def _biased(scores: Array, text: Text, sequences: Array, values: Array) -> Array:
    before = sequences.shape[1] - 1
    padded = jnp.pad(text.tokens, ((0, 0), (before, 0)), constant_values=-1)
    end = lax.dynamic_slice_in_dim(padded, text.length, before, axis=1)[:, None]  # [n, 1, L - 1]
    wanted = sequences[None, :, :-1]
    matches = ((wanted == end) | (wanted < 0)).all(2)  # [n, sequences]
    last = jnp.where(sequences[:, -1] < 0, scores.shape[1], sequences[:, -1])
    return scores.at[:, last].add(jnp.where(matches, values[None], 0.0), mode="drop")


def _diverse(scores: Array, text: Text, penalty: Array) -> Array:
    return scores if text.taken is None else scores - penalty * text.taken.astype(scores.dtype)


def _penalised(scores: Array, text: Text, penalty: Array) -> Array:
    rows, ids = _settled(scores, text)
    found = scores.at[rows, ids].get(mode="fill", fill_value=0.0)  # [n, W]
    changed = jnp.where(found < 0, found * penalty, found / penalty)
    return scores.at[rows, ids].set(changed, mode="drop")


def _without_repeats(scores: Array, text: Text, size: Array) -> Array:
    # A token that once followed the last size - 1 ones would repeat a run of that size.
    rows, ids = _settled(scores, text)
    repeats = agreement(text.tokens, text.length, size - 1) >= size - 1
    ids = jnp.where(repeats, ids, scores.shape[1])
    return scores.at[rows, ids].set(-jnp.inf, mode="drop")


def _held_back(scores: Array, text: Text, stops: Array, column: Array) -> Array:
    return jnp.where(stops[None] & (text.length < column), -jnp.inf, scores)


def _begun(scores: Array, text: Text, token: Array) -> Array:
    forced = jnp.where(_ids(scores) == token, 0.0, -jnp.inf).astype(scores.dtype)
    return jnp.where((_held(text, text.length) == 1)[:, None], forced, scores)


def _ended(scores: Array, text: Text, tokens: Array, column: Array) -> Array:
    forced = jnp.where(tokens[None], 0.0, -jnp.inf).astype(scores.dtype)
    return jnp.where(text.length == column, forced, scores)


def _valid(scores: Array, text: Text) -> Array:
    return jnp.nan_to_num(scores, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)


def _hastened(scores: Array, text: Text, stops: Array, column: Array, factor: Array) -> Array:
    beyond, most = (text.length - column).astype(scores.dtype), jnp.finfo(scores.dtype).max
    exponent = beyond * jnp.log(factor)
    raised = scores + jnp.where(scores == 0, 0.0, jnp.abs(scores) * jnp.expm1(exponent))
    # In float64, in which the others count, most of what is too large here is not.
    raised = jnp.where(exponent < _MOST_EXPONENT, jnp.clip(raised, -most, most), raised)
    # What is forbidden stays so, also where that is a number by now: see `_valid`.
    is_free = (scores > -_LARGEST) & (scores < jnp.inf)
    return jnp.where(stops[None] & (beyond > 0) & is_free, raised, scores)


def _suppressed(scores: Array, text: Text, tokens: Array) -> Array:
    return jnp.where(tokens[None], -jnp.inf, scores)


def _suppressed_first(
    scores: Array, text: Text, tokens: Array, column: Array, forces: Array
) -> Array:
    # Where the first token is forced the second is the first that is chosen.
    start = column + (forces & (_held(text, column) == 1)).astype(jnp.int32)  # [n]
    return jnp.where(tokens[None] & (text.length == start)[:, None], -jnp.inf, scores)


def _held(text: Text, end: Array) -> Array:
    """How many real tokens a row has before a column, int32 `[n]`."""
    columns = jnp.arange(text.tokens.shape[1], dtype=jnp.int32)[None]
    return ((text.tokens >= 0) & (columns < end)).sum(1, dtype=jnp.int32)


def _settled(scores: Array, text: Text) -> tuple[Array, Array]:
    """Rows `[n, 1]` and settled ids `[n, W]`, outside the vocabulary where there is none."""
    columns = jnp.arange(text.tokens.shape[1], dtype=jnp.int32)[None]
    is_real = (text.tokens >= 0) & (columns < text.length)
    rows = jnp.arange(len(scores), dtype=jnp.int32)[:, None]
    return rows, jnp.where(is_real, text.tokens, scores.shape[1])


def _ids(scores: Array) -> Array:
    return jnp.arange(scores.shape[1], dtype=jnp.int32)[None]


#: Every rule by its name: scores `[n, V]`, what it looks at, and its arrays.
RULES: Mapping[str, Callable[..., Array]] = {
    "vocabulary": _vocabulary,
    "sequence_bias": _biased,
    "diversity_penalty": _diverse,
    "repetition_penalty": _penalised,
    "no_repeat_ngram_size": _without_repeats,
    "bad_words_ids": _biased,
    "min_new_tokens": _held_back,
    "forced_bos_token_id": _begun,
    "forced_eos_token_id": _ended,
    "remove_invalid_values": _valid,
    "exponential_decay_length_penalty": _hastened,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed_first,
    **CUTS,
}
