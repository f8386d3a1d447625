"""Everything that is settled before the first pass of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow import Tensor

from opt_core import arguments
from opt_core.generation import (
    Call,
    GenerationConfig,
    Plan,
    StopTable,
    Strategy,
    bucket,
    check_goes_on,
    given,
    plan,
    prompt_room,
    uniforms,
)
from opt_tf.decoder import Cache
from opt_tf.generation.rules import Functions, Rules, all_traced
from opt_tf.layers import check_ids


class Told(NamedTuple):
    """What a program is told: other values need no other program."""

    rules: Rules
    written: Tensor  # int32 [B, W]: the prompt as it was given, filled behind
    start: Tensor  # int32 []: the first column that is chosen
    end: Tensor  # int32 []: the column behind the last
    stops: Tensor  # bool [V]
    fill: Tensor  # int32 []
    uniforms: Tensor | None  # float64 [B, W, draws]: those of each column; None chooses the best
    table: Tensor | None  # int32 [n, V]: that of stop strings
    guidance: Tensor | None  # float64 []
    hidden: Tensor | None  # int32 []: columns that a wider negative prompt put before the prompt
    fed: Tensor | None  # int32 [R, W]: the columns as they are fed, where there is no cache
    numbers: tuple[Tensor, ...]  # what the strategy takes besides

    @property
    def is_mended(self) -> bool:
        """Whether rules turn NaN into numbers."""
        return "remove_invalid_values" in self.rules


class Made(NamedTuple):
    """What a program is made with: each needs a program of its own."""

    functions: Functions
    caches: bool
    collects: bool
    beams: int = 1
    groups: int = 1
    #: How many candidates each group, or contrastive search, looks at.
    candidates: int = 1
    drafts: int = 0
    longest: int = 0


class Setup(NamedTuple):
    """One generation, before anything is computed."""

    model: Any
    asked: GenerationConfig
    plan: Plan
    prompt: Tensor  # int [B, P], as it was given, once for each text
    ids: NDArray[np.int32]  # [R, P]: what is fed, with columns for a wider negative prompt
    shown: NDArray[np.bool_]  # [R, P]
    past: Cache | None
    held: int
    matched: NDArray[np.int32]  # [B]
    told: Told
    made: Made
    assistant: Any
    compiled: bool
    hosted: bool

    @property
    def strategy(self) -> Strategy:
        """How tokens are chosen; drafts save nothing where every step is looked at."""
        drafted = self.assistant is not None or self.asked.strategy is Strategy.ASSISTED
        # Functions see the texts of all rows; drafts settle one row after the other.
        sees_rows = any(self.made.functions) and len(self.prompt) > 1
        if drafted and not (self.hosted or sees_rows or self.made.collects):
            return Strategy.ASSISTED
        if self.asked.strategy is Strategy.ASSISTED:
            return Strategy.SAMPLING if self.asked.do_sample else Strategy.GREEDY
        return self.asked.strategy

    @property
    def room(self) -> int:
        """How many columns the program of the prompt feeds."""
        if not self.held:
            return self.plan.prompt_room
        return prompt_room(self.plan.prompt_length - self.held)

    @property
    def widened(self) -> int:
        """How many columns a wider negative prompt put before what is fed of the prompt."""
        return self.plan.prompt_length - int(self.prompt.shape[1])

    def compacted(self) -> NDArray[np.int32]:
        """The real tokens of each text moved up to the last column of the prompt: `[B, W]`."""
        B, P = len(self.prompt), self.plan.prompt_length
        result = np.full((B, self.plan.width), self.asked.fill, np.int32)
        result[:, :P] = -1
        for row, ids, shown in zip(result, self.ids, self.shown[:B], strict=False):
            row[P - shown.sum() : P] = ids[shown]
        return result


def settle(model: Any, call: Call, options: Mapping[str, Any], *, compiled: bool) -> Setup:
    """All that a generation needs to know before its first pass.

    Raises:
        ValueError: as `generate`.
    """
    if not tf.executing_eagerly():
        raise ValueError(
            "generate runs programs of its own, compiled by XLA unless compiled=False: call "
            "it outside tf.function"
        )
    config = model.config
    asked = call.settled(model.generation_config, options)
    call.strategy(asked, config.vocab_size)  # raises where the assistant cannot draft
    prompt = _prompt(call.input_ids, asked, config.vocab_size)
    shown = _shown(prompt, call.attention_mask, asked.padding_id)
    past = _past(call, config, asked, shown)
    held = 0 if past is None else past.get_seq_length()
    ids = prompt.numpy().astype(np.int32)
    others = _unguided(call, asked, config.vocab_size, ids, shown)
    planned = _planned(asked, config, shown, others, held, call.drafts(asked))
    return _settled(model, call, asked, planned, prompt, shown, others, past, compiled)


def _settled(
    model: Any,
    call: Call,
    asked: GenerationConfig,
    planned: Plan,
    prompt: Tensor,
    shown: NDArray[np.bool_],
    others: _Rows | None,
    past: Cache | None,
    compiled: bool,
) -> Setup:
    """Every text once, then the same without their prompts; and what programs are told."""
    copies = 1 if asked.num_beams > 1 else asked.num_return_sequences
    held = 0 if past is None else past.get_seq_length()
    ids = prompt.numpy().astype(np.int32)
    B, P, V = len(ids) * copies, planned.prompt_length, model.config.vocab_size
    ids = _laid(ids, None if others is None else others.ids, P, copies)
    shown = _laid(shown, None if others is None else others.shown, P, copies)
    functions = Functions(
        call.prefix_allowed_tokens_fn,
        tuple(call.logits_processor or ()),
        tuple(call.stopping_criteria or ()),
    )
    table, matched = call.stop_table(asked, V), np.zeros(B, np.int32)
    if table is not None:
        matched[:] = [table.start(row[real]) for row, real in zip(ids, shown[:B], strict=False)]
    told = _told(model, asked, planned, ids, B, call, table, P - prompt.shape[1])
    rows = B * asked.num_beams
    return Setup(
        model=model,
        asked=asked,
        plan=planned,
        prompt=tf.repeat(prompt, copies, axis=0),
        ids=ids,
        shown=shown,
        past=None if past is None else past.mapped(partial(tf.repeat, repeats=copies, axis=0)),
        held=held,
        matched=matched,
        told=told,
        made=_made(asked, functions, call),
        assistant=call.assistant_model,
        compiled=compiled,
        hosted=not all_traced(functions, rows, planned.width, V, compiled),
    )


def _laid(rows: NDArray[Any], more: NDArray[Any] | None, P: int, copies: int) -> NDArray[Any]:
    """Each row so many times, then those without their prompts; narrower ones stand at the end."""
    both = [rows] if more is None else [rows, more]
    wide = [np.pad(some, [(0, 0), (P - some.shape[1], 0)]) for some in both]
    return np.concatenate([some.repeat(copies, axis=0) for some in wide])


# --- what is told ------------------------------------------------------------------------------


def _told(
    model: Any,
    asked: GenerationConfig,
    planned: Plan,
    ids: NDArray[np.int32],
    B: int,
    call: Call,
    table: StopTable | None,
    widened: int,
) -> Told:
    V, P, W = model.config.vocab_size, planned.prompt_length, planned.width
    fed = np.full((len(ids), W), asked.fill, np.int32)
    fed[:, :P] = ids
    stops = np.zeros(V, np.bool_)
    stops[list(asked.stops)] = True
    rules = given(asked, planned, vocab_size=V, known=call.known_tokens(V))
    return Told(
        rules={name: tuple(map(tf.constant, values)) for name, values in rules.items()},
        written=tf.constant(fed[:B]),
        start=tf.constant(P),
        end=tf.constant(P + planned.max_new_tokens),
        stops=tf.constant(stops),
        fill=tf.constant(asked.fill),
        uniforms=_drawn(asked, planned, B),
        table=None if table is None else tf.constant(table.after),
        guidance=tf.constant(asked.guidance_scale, tf.float64) if asked.is_guided else None,
        hidden=tf.constant(widened) if asked.is_guided else None,
        fed=None if asked.use_cache else tf.constant(fed),
        numbers=_numbers(asked),
    )


def _numbers(asked: GenerationConfig) -> tuple[Tensor, ...]:
    """Contrastive search takes its alpha, beams what says when a group is done."""
    if asked.num_beams == 1:
        return (tf.constant(asked.penalty_alpha or 0.0, tf.float64),)
    return (
        tf.constant(asked.length_penalty, tf.float64),
        tf.constant(asked.early_stopping is True),
        # Whether a beam is held to what it could still become, not to what it is.
        tf.constant(asked.early_stopping == "never" and asked.length_penalty > 0),
        tf.constant(asked.waits_for_batch),
    )


def _drawn(asked: GenerationConfig, planned: Plan, B: int) -> Tensor | None:
    if not asked.do_sample:
        return None
    count, draws = planned.max_new_tokens, asked.candidates if asked.num_beams > 1 else 1
    result = np.zeros((B, planned.width, draws))
    start = planned.prompt_length
    result[:, start : start + count] = uniforms(asked.seed, B, count, draws)
    return tf.constant(result)


def _made(asked: GenerationConfig, functions: Functions, call: Call) -> Made:
    return Made(
        functions=functions,
        caches=asked.use_cache,
        collects=asked.output_scores or asked.output_logits,
        beams=asked.num_beams,
        groups=asked.num_beam_groups,
        candidates=asked.candidates,
        drafts=call.drafts(asked),
        longest=0 if call.assistant_model is not None else asked.max_matching_ngram_size or 2,
    )


# --- prompts -----------------------------------------------------------------------------------


class _Rows(NamedTuple):
    ids: NDArray[np.int32]
    shown: NDArray[np.bool_]


def _prompt(input_ids: Any, generation: GenerationConfig, vocab_size: int) -> Tensor:
    if input_ids is None:
        if generation.bos_token_id is None:
            raise arguments.missing_prompt()
        return tf.constant([[generation.bos_token_id]])
    prompt = tf.convert_to_tensor(input_ids)
    kind = prompt.dtype
    arguments.check_prompt(arguments.Given(tuple(prompt.shape), kind.name, kind.is_floating))
    check_ids(prompt, vocab_size)
    return prompt


def _shown(prompt: Tensor, mask: Any, padding: int | None) -> NDArray[np.bool_]:
    """Where the real tokens of a prompt are, bool `[B, P]`."""
    if mask is None:
        shown = np.ones(prompt.shape, np.bool_) if padding is None else prompt.numpy() != padding
        return np.asarray(shown)
    values = tf.convert_to_tensor(mask).numpy()
    arguments.check_prompt_mask(values.shape, tuple(prompt.shape))
    if not np.all((values == 0) | (values == 1)):
        raise arguments.unknown_mask_values()
    return np.asarray(values != 0)


def _unguided(
    call: Call,
    asked: GenerationConfig,
    vocab_size: int,
    ids: NDArray[np.int32],
    shown: NDArray[np.bool_],
) -> _Rows | None:
    """Each row without its prompt: its last real token alone, or the negative prompt."""
    if not asked.is_guided:
        return None
    if call.negative_prompt_ids is None:
        last = np.where(shown, np.arange(shown.shape[1]), 0).max(axis=1)
        alone = ids[np.arange(len(ids)), last][:, None]
        return _Rows(alone, np.ones(alone.shape, np.bool_))
    prompt = _prompt(call.negative_prompt_ids, asked, vocab_size)
    arguments.check_negative_prompt(tuple(prompt.shape), len(ids))
    also = _shown(prompt, call.negative_prompt_attention_mask, asked.padding_id)
    return _Rows(prompt.numpy().astype(np.int32), also)


def _planned(
    asked: GenerationConfig,
    config: Any,
    shown: NDArray[np.bool_],
    others: _Rows | None,
    held: int,
    drafts: int,
) -> Plan:
    """The plan, in which a negative prompt that is wider than the prompt widens it."""
    P = shown.shape[1]
    lengths = shown.sum(axis=1).tolist()
    if others is not None:
        lengths += others.shown.sum(axis=1).tolist()
    planned = plan(asked, config, prompt_length=P, row_lengths=lengths, drafts=drafts)
    widened = 0 if others is None else max(0, others.ids.shape[1] - P)
    if widened:
        same = {
            "max_new_tokens": planned.max_new_tokens,
            "min_new_tokens": planned.min_new_tokens,
            "max_length": None,
            "min_length": None,
        }
        wide = asked.merged(**same)
        planned = plan(wide, config, prompt_length=P + widened, row_lengths=lengths, drafts=drafts)
    if held:
        room = bucket(held + prompt_room(planned.prompt_length - held))
        planned = planned._replace(capacity=max(planned.capacity, room))
    return planned


def _past(
    call: Call, config: Any, asked: GenerationConfig, shown: NDArray[np.bool_]
) -> Cache | None:
    """The cache of an earlier call, if what it lacks is not needed: hidden states, other rows."""
    past = Cache.of(call.past_key_values, config.num_hidden_layers)
    if past is None:
        return None
    held = past.get_seq_length()
    arguments.check_past(held, int(past.keys[0].shape[0]), shown.shape)
    check_goes_on(asked)
    if not (goes_on := shown[:, held:].any(axis=1)).all():
        raise arguments.past_holds_row(int(goes_on.argmin()))
    return past.counted() if held else None
