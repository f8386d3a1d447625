"""Beam search for texts that hold given words: compiled passes, and bookkeeping on the host."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from opt_core import arguments
from opt_core.generation import Candidate, ForcedWords, Hypothesis
from opt_flax.generation import beams
from opt_flax.generation.collecting import Outcome, gathered
from opt_flax.generation.decoding import Asked, Program, Seen, prefill, written
from opt_flax.generation.rules import Text, chain, stopped
from opt_flax.generation.setup import Run

Floats = NDArray[np.float64]


def search(run: Run) -> Outcome:
    """Search every text; which beams go on is for `ForcedWords` to say."""
    program, asked, K = run.program, run.asked, run.program.beams
    texts = [ForcedWords(run.generation, run.plan) for _ in range(run.texts.rows)]
    sums = np.full((len(texts), K), -np.inf)
    sums[:, 0] = 0.0
    first, logits, _ = prefill(program, run.params, run.begun, asked)
    state, logits = beams.spread(program, first, logits)
    seen = []
    for _ in range(run.plan.max_new_tokens):
        found = _scored(program, state, logits, asked)
        seen.append(found)
        scores = np.asarray(found.scores, np.float64).reshape(len(texts), K, -1)
        parents, tokens = np.zeros((2, len(texts), K), np.int32)
        for row, text in enumerate(texts):
            if text.is_done:
                continue
            _check(run, row, text, scores[row][sums[row] > -np.inf])
            running = _step(run, row, text, scores[row], sums[row], state)
            sums[row] = [one.score for one in running]
            parents[row], tokens[row] = zip(*((c.beam, c.token) for c in running), strict=True)
        state = _followed(program, state, parents, tokens, asked)
        if all(text.is_done for text in texts) or int(state.length) == int(asked.end):
            break
        state, logits = beams.fed(program, run.params, state, asked)
    return _found(run, texts, state, tuple(seen))


def _scored(program: Program, state: beams.State, logits: Array, asked: Asked) -> Seen:
    raw = beams.log_probabilities(logits, asked)
    B, K, V = raw.shape
    tokens = state.tokens.reshape(B * K, -1)
    places = jnp.asarray(np.arange(B * K, dtype=np.int32) // K)
    text = Text(tokens, state.length, places, None)
    if program.functions.all:
        text = text._replace(ids=written(asked, tokens))
    rows = raw.reshape(B * K, V)
    if "remove_invalid_values" not in asked.given:
        # A rule may hide what is no number.
        rows = jnp.where(jnp.isnan(rows).any(1, keepdims=True), jnp.nan, rows)
    return Seen(logits[:B].reshape(B * K, V), chain(program.functions, rows, text, asked.given))


def _check(run: Run, row: int, text: ForcedWords, scores: Floats) -> None:
    highest = scores.max()
    if not highest < np.inf:
        error = arguments.nan_scores if np.isnan(highest) else arguments.infinite_scores
        raise error(int(run.texts.shown[row].sum()) + len(text.texts[0]))


def _step(
    run: Run, row: int, text: ForcedWords, scores: Floats, running: Floats, state: beams.State
) -> list[Candidate]:
    """One step of one text, from scores `[K, V]` and the sums `[K]` so far to its K beams."""
    matched, sums = np.asarray(state.matched)[row], scores + running[:, None]

    def ends(beam: int, token: int) -> bool:
        if token in run.generation.stops:
            return True
        table = run.asked.table
        if table is not None and int(table[matched[beam], token]) == len(table) - 1:
            return True
        return _is_stopped(run, row, [*text.texts[beam], token], scores[[beam]])

    flat, count = sums.ravel(), run.program.candidates
    least = np.partition(flat, -count)[-count] if count < flat.size else -np.inf
    places = np.flatnonzero(flat >= least)
    places = places[np.argsort(-flat[places], kind="stable")][:count].tolist()
    V = sums.shape[1]
    best = [Candidate(float(flat[p]), p // V, p % V) for p in places if flat[p] > -np.inf]
    return text.step(best, lambda beam, token: float(sums[beam, token]), ends)


def _is_stopped(run: Run, row: int, chosen: list[int], scores: Floats) -> bool:
    """Whether a criterion ends one text."""
    if not run.program.functions.criteria:
        return False
    P = run.prompt.shape[1]
    ids = np.full((1, run.program.width), run.generation.fill, np.int32)
    ids[0, :P] = run.prompt[row]
    ids[0, P : P + len(chosen)] = chosen
    length = jnp.int32(P + len(chosen))
    said = stopped(run.program.functions, jnp.asarray(ids), jnp.asarray(scores, np.float32), length)
    return bool(np.asarray(said)[0])


@partial(jax.jit, static_argnums=0)
def _followed(
    program: Program, state: beams.State, parents: Array, tokens: Array, asked: Asked
) -> beams.State:
    """The state in which every beam follows another one with a token, `[B, K]` twice."""
    texts = beams.taken(state.tokens, parents)
    texts = lax.dynamic_update_index_in_dim(texts, tokens, state.length, 2)
    matched = beams.taken(state.matched, parents)
    if asked.table is not None:
        matched = asked.table[matched, tokens]
    return beams.moved(program, state._replace(tokens=texts, matched=matched), parents, asked)


def _found(
    run: Run, texts: list[ForcedWords], state: beams.State, seen: tuple[Seen, ...]
) -> Outcome:
    P, K, W = run.plan.prompt_length, run.program.beams, run.program.width
    returned, found = run.program.returned, list[tuple[int, int, Hypothesis]]()
    for row, text in enumerate(texts):
        best = text.results(returned)
        if not best:
            raise arguments.no_token_left(int(run.texts.shown[row].sum()))
        found += [(row * returned + rank, row, one) for rank, one in enumerate(best)]
    rows = len(texts) * returned
    # What does not exist is empty.
    tokens = np.full((rows, W), run.generation.fill, np.int32)
    paths, slots = np.full((rows, W), -1, np.int32), np.zeros((rows, W), np.int32)
    counts = np.zeros(rows, np.int32)
    scores = np.full(rows, -np.inf, np.float32)
    for place, row, one in found:
        scores[place] = one.score
        count = counts[place] = len(one.tokens)
        tokens[place, P : P + count] = one.tokens
        paths[place, P : P + count] = row * K + np.array(one.path)
        slots[place, P : P + count - 1] = P + np.arange(count - 1) * K + np.array(one.path[1:])
    cache = gathered(run, state.cache, counts, slots)
    return Outcome(tokens, P + int(counts.max()), cache, seen, scores, paths)
