"""Beam search, also in groups and with draws: the beams of a text share one row of the cache."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_core.generation import BeamState
from opt_flax.attention import Visible, wide
from opt_flax.decoder import Cache
from opt_flax.generation import cuts
from opt_flax.generation.cuts import Double
from opt_flax.generation.decoding import (
    NAN,
    NOTHING,
    Asked,
    Begun,
    Program,
    Seen,
    ends,
    flat,
    guided,
    headed,
    marked,
    newest,
    passed,
    places,
    prefill,
    twice,
    whole_pass,
    written,
)
from opt_flax.generation.rules import Text, chain, stopped

#: `scores` are `[B, K, 2]`: sums in two float32 each, so that long texts are ranked by all bits of
#: their log-probabilities.
State = BeamState[Array, Cache]

_NOWHERE = -jnp.inf


class Group(NamedTuple):
    """What of a `BeamState` belongs to one group of k beams."""

    tokens: Array  # int32 [B, k, W]
    scores: Array  # float32 [B, k, 2]
    matched: Array  # int32 [B, k]
    pool: Array
    pool_scores: Array
    pool_lengths: Array
    pool_slots: Array
    parents: Array  # int32 [B, k]: the running beams of the group that these go on from


class Candidates(NamedTuple):
    """The best M continuations of a group, best first."""

    scores: Array  # float32 [B, M]: the sum, less the best of the running beams; -inf: none
    sums: Double  # float32 [B, M] twice
    beams: Array  # int32 [B, M], of the group
    tokens: Array  # int32 [B, M, W]: the texts
    matched: Array  # int32 [B, M]
    ended: Array  # bool [B, M]: not because it is the last step


class Found(NamedTuple):
    """What a search returns, R sequences side by side for each text."""

    tokens: Array  # int32 [R, W]
    scores: Array  # float32 [R]
    lengths: Array  # int32 [R]: the number of new tokens
    slots: Array  # int32 [R, W]: where column c was fed, from column P on
    places: Array  # int32 [R]: the place in the pool


def start(program: Program, params: Any, begun: Begun, asked: Asked) -> tuple[State, Seen]:
    """The state after the first choice."""
    first, logits, _ = prefill(program, params, begun, asked)
    state, logits = spread(program, first, logits)
    return select(program, state, logits, asked)


@partial(jax.jit, static_argnums=0)
def spread(program: Program, first: Any, logits: Array) -> tuple[State, Array]:
    """K beams of which the first of every group exists, and their scores `[R, K, V]`."""
    B, W = first.tokens.shape
    K, G = program.beams, program.groups

    def each(rows: Array) -> Array:
        return jnp.broadcast_to(rows[:, None], (len(rows), K, *rows.shape[1:]))

    tokens = each(first.tokens)
    heads = jnp.where(jnp.arange(K, dtype=jnp.int32) % (K // G) == 0, 0.0, _NOWHERE)
    sums = jnp.stack([heads.astype(jnp.float32), jnp.zeros(K, jnp.float32)], axis=1)
    nothing = jnp.zeros((B, K), jnp.int32)
    state = State(
        tokens=tokens,
        length=first.length,
        scores=jnp.broadcast_to(sums[None], (B, K, 2)),
        matched=each(first.matched),
        slots=jnp.zeros((B, K, W), jnp.int32),
        mask=each(first.mask),
        positions=each(first.positions),
        pool=tokens,
        pool_scores=jnp.full((B, K), _NOWHERE, jnp.float32),
        pool_lengths=nothing,
        pool_slots=jnp.zeros((B, K, W), jnp.int32),
        done=jnp.zeros((B, G), bool),
        cache=first.cache,
    )
    return state, each(logits)


def step(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, Seen]:
    """Feed the newest token of every beam, and choose the next ones."""
    state, logits = fed(program, params, state, asked)
    return select(program, state, logits, asked)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def fed(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, Array]:
    """Feed the newest token of every beam: K queries a row, whose scores are `[R, K, V]`."""
    after: tuple[State, Array] = flat(_fed, program, params, state, asked)
    return after


def _fed(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, Array]:
    R, K = state.positions.shape
    if not program.keeps_cache:
        ids = written(asked, _joined(state.tokens), every=True)  # [R * K, W]
        columns = jnp.arange(program.width, dtype=jnp.int32)[None, None]
        is_prompt, is_chosen = columns < asked.first, columns < state.length
        shown = jnp.where(is_prompt, state.mask[:, :, : program.width], is_chosen)
        logits = whole_pass(program, params, ids, _joined(shown))
        return state, logits.reshape(R, K, -1)
    visible = Visible(state.cache.length, K, program.capacity, None, state.mask[:, None])
    ids = twice(newest(state), R)  # [R, K]
    hidden, cache = passed(program, params, visible, ids, state.positions, state.cache)
    logits = headed(program, params, hidden)  # [R, K, V]
    return state._replace(cache=cache, positions=state.positions + 1), logits


def select(program: Program, state: State, logits: Array, asked: Asked) -> tuple[State, Seen]:
    """Choose the beams that go on from their scores `[R, K, V]`, group after group."""
    B, K = state.tokens.shape[:2]
    k = K // program.groups
    scores_of_all = log_probabilities(logits, asked)  # [B, K, V]
    groups, scores, counts = [], [], None
    for g in range(program.groups):
        group = _group(state, slice(g * k, g * k + k))
        raw = _joined(scores_of_all[:, g * k : g * k + k])
        text = Text(
            _joined(group.tokens), state.length, places(asked, B * k, k), None, _each(counts, k)
        )
        if program.functions.all:
            text = text._replace(ids=written(asked, text.tokens))
        after = chain(program.functions, raw, text, asked.given)
        found = _candidates(program, group, raw, after, state.done[:, g], state.length, asked)
        if program.functions.criteria:
            ids = written(asked, _joined(found.tokens))
            followed = _joined(taken(after.reshape(B, k, -1), found.beams))
            ended = stopped(program.functions, ids, followed, state.length + 1)
            found = found._replace(ended=found.ended | ended.reshape(found.ended.shape))
        done, slots = state.done[:, g], state.slots[:, g * k : g * k + k]
        group, done, counts = _settled(
            program, group, slots, found, done, counts, state.length, asked
        )
        groups.append((group, done))
        scores.append(after.reshape(B, k, -1))
    cache, state = state.cache, state._replace(cache=None)  # type: ignore[arg-type]
    state = _joined_groups(program, state, groups, asked)._replace(cache=cache)
    return state, Seen(_joined(logits[:B]), _joined(jnp.concatenate(scores, axis=1)))


@jax.jit
def log_probabilities(logits: Array, asked: Asked) -> Array:
    """What beams start from: `[R, K, V]` -> `[B, K, V]`."""
    return guided(cuts.log_probabilities(logits.astype(wide(logits.dtype))), asked)


def _group(state: State, beams: slice) -> Group:
    fields = (getattr(state, name)[:, beams] for name in Group._fields[:-1])
    k = beams.stop - beams.start
    parents = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None], (len(state.tokens), k))
    return Group._make([*fields, parents])


@partial(jax.jit, static_argnums=0)
def _candidates(
    program: Program,
    group: Group,
    raw: Array,
    scores: Array,
    done: Array,
    length: Array,
    asked: Asked,
) -> Candidates:
    """The best of all pairs of beam and token, or drawn ones."""
    B, k = group.matched.shape
    V, M = scores.shape[1], program.candidates
    high, low = group.scores[..., 0], group.scores[..., 1]
    # Sums less the best one are small numbers, whose rounding does not blur their order.
    base = high.max(1, keepdims=True)
    base = jnp.where(jnp.isfinite(base), base, 0.0)
    exists = jnp.isfinite(high)
    lead = jnp.where(exists, (high - base) + low, _NOWHERE)
    every = (scores.reshape(B, k, V) + lead[..., None].astype(scores.dtype)).reshape(B, k * V)
    if program.samples:
        assert asked.uniforms is not None
        uniforms = lax.dynamic_index_in_dim(asked.uniforms, length - asked.first, 1, keepdims=False)
        values, found = cuts.drawn(every, uniforms)
    else:
        values, found = cuts.best(every, M)
    beams, tokens = found // V, found % V
    own = jnp.take_along_axis(scores.reshape(B, k * V), found, axis=1).astype(jnp.float32)
    sums = cuts.added(taken(high, beams), taken(low, beams), own)

    broken = marked(jnp.zeros(B * k, jnp.int32), raw, scores, asked, most=False)
    # A beam of which nothing can be chosen just ends.
    broken = jnp.where(broken == NOTHING, 0, broken).reshape(B, k)
    broken = jnp.where(exists & ~done[:, None], broken, 0).min(1, keepdims=True)
    tokens = jnp.where(broken < 0, broken, tokens)
    matched, ended = ends(taken(group.matched, beams), tokens, asked)
    texts = lax.dynamic_update_index_in_dim(taken(group.tokens, beams), tokens, length, 2)
    return Candidates(values, sums, beams, texts, matched, ended)


@partial(jax.jit, static_argnums=0)
def _settled(
    program: Program,
    group: Group,
    slots: Array,
    found: Candidates,
    done: Array,
    counts: Array | None,
    length: Array,
    asked: Asked,
) -> tuple[Group, Array, Array | None]:
    """Keep what ended, and run on with the best of the rest; a group that is done stays."""
    assert asked.ranking is not None
    k = group.matched.shape[1]
    penalty = asked.ranking[1]
    new = length + 1 - asked.first
    is_last = length + 1 >= asked.end
    ended = (found.ended | is_last) & (found.scores > _NOWHERE)
    totals = jnp.where(ended, _scaled(found.sums[0] + found.sums[1], new, penalty), _NOWHERE)
    # Behind what the pool holds already: of equals the older one comes first.
    pool_scores, kept = lax.top_k(jnp.concatenate([group.pool_scores, totals[:, :k]], 1), k)
    slots = taken(slots, found.beams)

    def pooled(older: Array, newer: Array) -> Array:
        return taken(jnp.concatenate([older, newer[:, :k]], axis=1), kept)

    running, stay = lax.top_k(jnp.where(found.ended, _NOWHERE, found.scores), k)
    exists = running > _NOWHERE
    high, low = (taken(part, stay) for part in found.sums)
    after = Group(
        tokens=taken(found.tokens, stay),
        scores=jnp.stack([jnp.where(exists, high, _NOWHERE), jnp.where(exists, low, 0.0)], 2),
        matched=taken(found.matched, stay),
        pool=pooled(group.pool, found.tokens),
        pool_scores=pool_scores,
        pool_lengths=pooled(group.pool_lengths, jnp.broadcast_to(new, ended.shape)),
        pool_slots=pooled(group.pool_slots, slots),
        parents=taken(found.beams, stay),
    )
    best = jnp.where(exists, high + low, _NOWHERE).max(1)
    if program.groups > 1:
        # As in transformers' search in groups: what has just ended counts as well.
        best = jnp.where(exists.any(1), found.sums[0][:, 0] + found.sums[1][:, 0], _NOWHERE)
    is_done = _is_done(asked, best, pool_scores.min(1), new, done)
    after = jax.tree.map(
        lambda new, old: jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), old, new), after, group
    )
    if program.groups > 1:
        chosen = lax.dynamic_index_in_dim(taken(found.tokens, stay), length, 2, keepdims=False)
        counts = _counted(program, counts, chosen, exists & ~done[:, None])
    return after, is_done, counts


def _is_done(asked: Asked, best: Array, worst: Array, new: Array, done: Array) -> Array:
    """Whether `best`, -inf where nothing runs on, can't enter a pool whose worst is `worst`."""
    assert asked.ranking is not None
    early, penalty = asked.ranking
    longest = jnp.where((early == 2) & (penalty > 0), asked.end - asked.first, new)
    is_settled = (early == 1) | (_scaled(best, longest, penalty) <= worst)
    is_empty = best == _NOWHERE
    is_done = done | is_empty | ((worst > _NOWHERE) & is_settled)
    # While one text goes on, others that wait for it may still find something better.
    return jnp.where(early == 3, is_done.all() | is_empty, is_done)


def _counted(program: Program, counts: Array | None, chosen: Array, runs_on: Array) -> Array:
    """How many beams took each token, `[B, V]`: those of earlier groups, and `[B, k]` more.

    Also in the last step, which ends all beams, groups are to differ from each other.
    """
    B, V = len(chosen), program.module.config.vocab_size
    counts = jnp.zeros((B, V), jnp.float32) if counts is None else counts
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    return counts.at[rows, chosen].add(runs_on.astype(jnp.float32), mode="drop")


@partial(jax.jit, static_argnums=0)
def _joined_groups(
    program: Program, state: State, groups: list[tuple[Group, Array]], asked: Asked
) -> State:
    """The state after the groups' choices."""
    fields: dict[str, Any] = {
        name: jnp.concatenate([getattr(group, name) for group, _ in groups], axis=1)
        for name in Group._fields
    }
    own = jnp.arange(program.beams, dtype=jnp.int32)
    parents = fields.pop("parents") + (own - own % (program.beams // program.groups))[None]
    done = jnp.stack([done for _, done in groups], axis=1)
    fields["done"] = done
    return moved(program, state._replace(**fields), parents, asked)


def moved(program: Program, state: State, parents: Array, asked: Asked) -> State:
    """The state after a choice: masks follow the beams `[B, K]`, keys and values stay."""
    K, R = program.beams, len(state.mask)
    # The slots that the next step feeds.
    slots = asked.first + (state.length - asked.first) * K + jnp.arange(K, dtype=jnp.int32)
    mask = taken(state.mask, twice(parents, R))
    columns = jnp.arange(mask.shape[2], dtype=jnp.int32)[None]
    rows = jnp.broadcast_to(slots[None], parents.shape)
    return state._replace(
        mask=mask | (columns == slots[:, None])[None],
        slots=lax.dynamic_update_index_in_dim(taken(state.slots, parents), rows, state.length, 2),
        length=state.length + 1,
    )


def goes_on(state: State, asked: Asked) -> Array:
    """Whether another token is asked for, bool `[]`; not after scores without a choice."""
    return (state.length < asked.end) & ~state.done.all() & (newest(state) > NAN).all()


@partial(jax.jit, static_argnums=0)
def found(program: Program, state: State, asked: Asked) -> Found:
    """The best sequences of each text, of all its groups."""
    scores, chosen = lax.top_k(state.pool_scores, program.returned)
    tokens = taken(state.pool, chosen)
    if program.groups > 1:
        tokens = _first_stops(tokens, asked)
    columns = jnp.arange(tokens.shape[2], dtype=jnp.int32)
    # A search that broke off, or found nothing, shows it; what does not exist is empty.
    worst, is_there = newest(state).min(1, keepdims=True), scores > _NOWHERE
    empty = jnp.where(is_there.any(1, keepdims=True), asked.fill, NOTHING)
    empty = jnp.where(worst <= NAN, worst, empty)[..., None]  # [B, 1, 1]
    is_empty = ((worst <= NAN) | ~is_there)[..., None] & (columns >= asked.first)[None, None]
    tokens = jnp.where(is_empty, empty, tokens)
    lengths, slots = taken(state.pool_lengths, chosen), taken(state.pool_slots, chosen)
    lengths = jnp.where(is_there, lengths, 0)
    return Found(*(_joined(x) for x in (tokens, scores, lengths, slots, chosen)))


@jax.jit
def gathered(cache: Cache, rows: Array, slots: Array, first: Array) -> Cache:
    """The keys and values of sequences `[R]` by their rows and slots, int32 `[R, W]`."""
    columns = jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
    slots = jnp.where(columns < first, columns, slots)[:, None, :, None]

    def take(buffer: Array) -> Array:
        return jnp.take_along_axis(buffer[rows], slots, axis=2)

    keys, values = jax.tree.map(take, (cache.keys, cache.values))
    return Cache(keys, values, cache.length)


def _first_stops(tokens: Array, asked: Asked) -> Array:
    """With groups the first stop token stands for whichever ended a text, as in transformers."""
    columns = jnp.arange(tokens.shape[2], dtype=jnp.int32) >= asked.first
    is_stop = jnp.isin(tokens, asked.stops, method="compare_all") & columns[None, None]
    return jnp.where(is_stop, asked.stops[0], tokens)


def _scaled(sums: Array, count: Array, penalty: Array) -> Array:
    return sums / jnp.power(count.astype(jnp.float32), penalty)


def taken(values: Array, chosen: Array) -> Array:
    """Rows `[B, n, ...]` by their places `[B, m]` -> `[B, m, ...]`."""
    return jnp.take_along_axis(
        values, chosen.reshape(*chosen.shape, *(1,) * (values.ndim - 2)), axis=1
    )


def _joined(values: Array) -> Array:
    """`[B, k, ...]` -> `[B * k, ...]`."""
    return values.reshape(-1, *values.shape[2:])


def _each(values: Array | None, copies: int) -> Array | None:
    return None if values is None else jnp.repeat(values, copies, axis=0)
