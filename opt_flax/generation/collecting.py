"""What a generation gives back: sequences, and the record with all that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from opt_core import arguments
from opt_core.generation import bucket, prompt_room
from opt_core.outputs import GenerateOutput
from opt_flax.decoder import Cache, is_traced
from opt_flax.generation import beams
from opt_flax.generation.decoding import INFINITE, NAN, NOTHING, Begun, Seen, prefill, voided
from opt_flax.generation.setup import WHOLE, Run

Ints = NDArray[np.integer[Any]]

#: What a token that could not be chosen says, after so many tokens.
_ERRORS: Mapping[int, Callable[[int], ValueError]] = {
    NAN: arguments.nan_scores,
    NOTHING: arguments.no_token_left,
    INFINITE: arguments.infinite_scores,
}


class Outcome(NamedTuple):
    """What a strategy leaves behind, of R sequences."""

    tokens: Any  # int32 [R, W]
    length: Any  # int32 []: how many columns are settled
    #: R rows. None where some ended before others, since what they ended with was never fed.
    cache: Cache | None
    seen: tuple[Seen, ...] = ()
    scores: Any = None  # float32 [R]: of beams
    paths: Any = None  # int32 [R, W]: the running beam that each column was chosen from, or -1


def of_rows(states: list[Any], seen: tuple[Seen, ...]) -> Outcome:
    """The outcome of one state, or of several that ran one after the other."""
    tokens, caches = [s.tokens for s in states], [getattr(s, "decode", s).cache for s in states]
    if len(states) == 1:
        return Outcome(tokens[0], states[0].length, caches[0], seen)
    joined, lengths = np.concatenate(tokens), [int(s.length) for s in states]
    length = max(lengths)
    if min(lengths) < length:
        return Outcome(joined, length, None, seen)
    keys, values = jax.tree.map(
        lambda *rows: jnp.concatenate(rows), *((cache.keys, cache.values) for cache in caches)
    )
    return Outcome(joined, length, Cache(keys, values, length - 1), seen)


def of_beams(run: Run, state: beams.State, seen: tuple[Seen, ...]) -> Outcome:
    """The best sequences of a search."""
    found = beams.found(run.program, state, run.asked)
    if is_traced(found.tokens):
        return Outcome(found.tokens, state.length, None)
    tokens, scores, counts, slots, places = map(np.asarray, found)
    P, K, k = run.plan.prompt_length, run.program.beams, run.program.beams // run.program.groups
    texts = np.arange(len(tokens)) // run.program.returned
    check(run, tokens[:: run.program.returned])
    columns = np.arange(tokens.shape[1])
    # A token was chosen from the beam that the one before it was fed as.
    before = np.roll((slots - P) % K, 1, axis=1)
    before[:, P] = places // k * k
    is_new = (columns >= P) & (columns < P + counts[:, None])
    paths = np.where(is_new, texts[:, None] * K + before, -1)
    cache = gathered(run, state.cache, counts, slots)
    return Outcome(tokens, P + int(counts.max()), cache, seen, scores, paths)


def gathered(run: Run, cache: Cache, counts: Ints, slots: Ints) -> Cache | None:
    """The cache of sequences of so many new tokens `[R]`, each fed in its slots `[R, W]`."""
    is_asked = run.program.keeps_cache and run.generation.return_dict_in_generate
    if not is_asked or counts.min() < counts.max():
        return None
    texts = np.arange(len(slots), dtype=np.int32) // run.program.returned
    found: Cache = beams.gathered(cache, texts, slots, run.asked.first)
    return found


def check(run: Run, tokens: Any) -> None:
    """Refuse tokens that were not chosen from numbers.

    Raises:
        ValueError: says after how many tokens.
    """
    if is_traced(tokens):
        return
    found = np.asarray(tokens)[..., run.plan.prompt_length :]
    if (found > NAN).all():
        return
    *row, column = np.argwhere(found <= NAN)[0].tolist()
    count = int(run.texts.shown[: run.texts.rows][row[0] % run.texts.rows].sum()) + column
    raise _ERRORS[int(found[(*row, column)])](count)


def sequences(run: Run, outcome: Outcome) -> Array:
    """The prompt as given, and what was chosen: int32 `[R, P + n]`."""
    P, prompt = run.plan.prompt_length, run.prompt
    copies = len(outcome.tokens) // len(prompt)
    if is_traced(outcome.tokens):
        tokens = voided(outcome.tokens, outcome.length)
        chosen = tokens[:, P : P + run.plan.max_new_tokens]
        return jnp.concatenate([jnp.repeat(jnp.asarray(prompt), copies, axis=0), chosen], axis=1)
    check(run, outcome.tokens)
    # By way of the host: a slice on the device is a program for each length.
    settled = np.asarray(outcome.tokens)[:, P : int(outcome.length)]
    rows = np.asarray(prompt[_texts(run, outcome)])
    result: Array = jax.device_put(np.concatenate([rows, settled], axis=1))
    return result


def record(model: Any, run: Run, outcome: Outcome) -> Array | GenerateOutput:
    """What `generate` returns."""
    result, asked = sequences(run, outcome), run.generation
    if not asked.return_dict_in_generate:
        return result
    values: dict[str, Any] = {"sequences": result}
    if is_traced(result):
        return GenerateOutput(values)
    P, end = run.plan.prompt_length, int(outcome.length)
    if run.program.keeps_cache:
        values["past_key_values"] = _cache(run, outcome, result)
    if outcome.scores is not None:
        values["sequences_scores"] = jnp.asarray(outcome.scores)
        values["beam_indices"] = jnp.asarray(outcome.paths[:, P:end])
    for name in ("scores", "logits"):
        if getattr(asked, f"output_{name}"):
            values[name] = tuple(getattr(seen, name) for seen in outcome.seen)
    if asked.output_attentions or asked.output_hidden_states:
        values |= _passed_again(model, run, outcome, result)
    return GenerateOutput(values)


def _texts(run: Run, outcome: Outcome) -> NDArray[Any]:
    """The text of every returned sequence."""
    return np.arange(len(outcome.tokens)) // (len(outcome.tokens) // run.texts.rows)


def _shown(run: Run, outcome: Outcome, count: int) -> NDArray[np.bool_]:
    """The real tokens of the sequences' first columns; what fills a row up may pass for them."""
    shown = np.asarray(run.texts.shown)[: run.texts.rows, run.texts.widened :]
    shown = shown[_texts(run, outcome)]
    return np.pad(shown, ((0, 0), (0, count - shown.shape[1])), constant_values=True)


def _past(run: Run, outcome: Outcome) -> Cache | None:
    past = run.texts.past
    return None if past is None else past.rows(_texts(run, outcome))


def _cache(run: Run, outcome: Outcome, result: Array) -> Cache:
    """Keys and values of all columns but the last, from one more pass where that is needed."""
    rows, count = len(result), result.shape[1] - 1
    if outcome.cache is None:
        cache, widened = _fed_again(run, outcome, np.asarray(result)[:, :-1]), 0
    else:
        cache, widened = outcome.cache, run.texts.widened
    keys, values = jax.tree.map(lambda x: x[:rows, :, widened:], (cache.keys, cache.values))
    return Cache(keys, values, jnp.int32(count))


def _fed_again(run: Run, outcome: Outcome, ids: Ints) -> Cache:
    """The cache of one pass over the sequences `[R, T]`, as if they were a prompt."""
    (rows, count), held = ids.shape, run.texts.held
    # In the sizes of a prompt's first pass, so that few programs serve all lengths.
    room = prompt_room(count - held)
    program = replace(run.program, capacity=max(run.program.width, bucket(held + room)))
    begun = Begun(
        ids=np.pad(ids[:, held:], ((0, 0), (0, held + room - count))),
        shown=np.pad(_shown(run, outcome, count), ((0, 0), (0, program.capacity - count))),
        tokens=outcome.tokens,
        matched=np.zeros(rows, np.int32),
        past=_past(run, outcome),
    )
    state, *_ = prefill(program, run.model_params, begun, run.asked._replace(first=WHOLE(count)))
    cache: Cache = state.cache
    return cache


def _passed_again(model: Any, run: Run, outcome: Outcome, result: Array) -> dict[str, Any]:
    """Hidden states and attentions of one pass over the sequences, cut into steps."""
    asked, ids, held, P = run.generation, np.asarray(result), run.texts.held, run.prompt.shape[1]
    out = model(
        ids[:, held:-1],
        attention_mask=_shown(run, outcome, ids.shape[1] - 1).astype(np.int32),
        params=run.model_params,
        past_key_values=_past(run, outcome),
        output_attentions=asked.output_attentions,
        output_hidden_states=asked.output_hidden_states,
        return_dict=True,
    )
    # The first step feeds the prompt, or what was fed of it; every other one token.
    steps = [(held, P), *((end - 1, end) for end in range(P + 1, ids.shape[1]))]

    def cut(values: Any, step: tuple[int, int], *, of_keys: bool) -> Array:
        start, end = step[0] - held, step[1] - held
        rows = np.asarray(values)
        return jnp.asarray(rows[:, :, start:end, : step[1]] if of_keys else rows[:, start:end])

    collected: dict[str, Any] = {}
    for name, layers in (("attentions", out.attentions), ("hidden_states", out.hidden_states)):
        if getattr(asked, f"output_{name}"):
            of_keys = name == "attentions"
            collected[name] = tuple(
                tuple(cut(x, s, of_keys=of_keys) for x in layers) for s in steps
            )
    return collected
