"""What a generation gives back: sequences, and the record with all that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from opt_core import arguments
from opt_core.outputs import GenerateOutput
from opt_flax.decoder import Cache, is_traced
from opt_flax.generation import beams
from opt_flax.generation.decoding import INFINITE, NAN, NOTHING, Seen, voided
from opt_flax.generation.setup import Run

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
    cache: Cache | None  # R rows
    seen: tuple[Seen, ...] = ()
    scores: Any = None  # float32 [R]: of beams
    paths: Any = None  # int32 [R, W]: the running beam that each column was chosen from, or -1


def of_rows(states: list[Any], seen: tuple[Seen, ...]) -> Outcome:
    """The outcome of one state, or of several that ran one after the other."""
    tokens, caches = [s.tokens for s in states], [getattr(s, "decode", s).cache for s in states]
    if len(states) == 1:
        return Outcome(tokens[0], states[0].length, caches[0], seen)
    keys, values = jax.tree.map(
        lambda *rows: jnp.concatenate(rows), *((cache.keys, cache.values) for cache in caches)
    )
    length = max(int(s.length) for s in states)
    return Outcome(np.concatenate(tokens), length, Cache(keys, values, length - 1), seen)


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
    cache = None
    if run.program.keeps_cache and run.generation.return_dict_in_generate:
        cache = beams.gathered(state.cache, texts.astype(np.int32), slots, run.asked.first)
    return Outcome(tokens, P + int(counts.max()), cache, seen, scores, paths)


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
    P, end, widened = run.plan.prompt_length, int(outcome.length), run.texts.widened
    if run.program.keeps_cache and outcome.cache is not None:
        cache = outcome.cache
        rows = len(result)
        keys, kept = jax.tree.map(lambda x: x[:rows, :, widened:], (cache.keys, cache.values))
        values["past_key_values"] = Cache(keys, kept, jnp.int32(end - 1 - widened))
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


def _passed_again(model: Any, run: Run, outcome: Outcome, result: Array) -> dict[str, Any]:
    """Hidden states and attentions of one pass over the sequences, cut into steps."""
    asked, texts = run.generation, _texts(run, outcome)
    ids, held = np.asarray(result), run.texts.held
    P = run.prompt.shape[1]
    shown = np.asarray(run.texts.shown)[: run.texts.rows, run.texts.widened :][texts]
    mask = np.pad(shown, ((0, 0), (0, ids.shape[1] - P - 1)), constant_values=True)
    past = run.texts.past
    past = None if past is None else past.rows(texts)
    out = model(
        ids[:, held:-1],
        attention_mask=mask.astype(np.int32),
        params=run.model_params,
        past_key_values=past,
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
