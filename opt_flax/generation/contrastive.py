"""Contrastive search (2202.06417): likely tokens, unlike in meaning to what is there already."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_flax.attention import Visible
from opt_flax.decoder import Cache
from opt_flax.generation import cuts, decoding
from opt_flax.generation.decoding import (
    Asked,
    Begun,
    Program,
    Seen,
    appended,
    flat,
    headed,
    marked,
    passed,
    places,
    prefill,
    written,
)
from opt_flax.generation.rules import Text, chain, stopped


class State(NamedTuple):
    """What is carried from one choice to the next; the newest token is fed already."""

    decode: decoding.State
    #: float32 [B, S, E]: the directions of the last hidden states, of length 1.
    context: Array
    #: [B, V]: the scores of the next token.
    logits: Array

    @property
    def length(self) -> Array:
        """As `DecodeState.length`."""
        return self.decode.length

    @property
    def tokens(self) -> Array:
        """As `DecodeState.tokens`."""
        return self.decode.tokens


@partial(jax.jit, static_argnums=0)
def start(program: Program, params: object, begun: Begun, asked: Asked) -> tuple[State, None]:
    """The state before the first choice."""
    state, logits, hidden = prefill(program, params, begun, asked)
    behind = ((0, 0), (0, program.capacity - hidden.shape[1]), (0, 0))
    return State(state, jnp.pad(_directions(hidden), behind), logits), None


def step(program: Program, params: object, state: State, asked: Asked) -> tuple[State, Seen]:
    """Look one token ahead for every candidate, and choose one."""
    decode = state.decode
    text = Text(decode.tokens, decode.length, places(asked, len(decode.tokens), 1), None)
    if program.functions.all:
        text = text._replace(ids=written(asked, decode.tokens))
    seen = Seen(state.logits, chain(program.functions, state.logits, text, asked.given))
    state = _advanced(program, params, state, seen.scores, asked)
    if program.functions.criteria:
        ids = written(asked, state.tokens)
        ended = stopped(program.functions, ids, seen.scores, state.length)
        decode = state.decode._replace(finished=state.decode.finished | ended)
        state = state._replace(decode=decode)
    return state, seen


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advanced(program: Program, params: object, state: State, scores: Array, asked: Asked) -> State:
    after: State = flat(partial(_chosen, program), params, state, scores, asked)
    return after


def _chosen(program: Program, params: object, state: State, scores: Array, asked: Asked) -> State:
    """Feed the candidates side by side, and keep the one that is chosen."""
    assert asked.alpha is not None
    decode, count = state.decode, program.candidates
    B, start = len(decode.tokens), decode.cache.length
    best, ids = cuts.best(scores, count)  # [B, k] twice
    chances = jnp.exp(best - jax.nn.logsumexp(scores, axis=1, keepdims=True))
    own = jnp.arange(program.capacity, dtype=jnp.int32)[None] == (
        start + jnp.arange(count, dtype=jnp.int32)[:, None]
    )
    allowed = decode.mask[:, None, None] | own[None, None]  # [B, 1, k, S]
    visible = Visible(start, count, program.capacity, None, allowed)
    positions = jnp.broadcast_to(decode.positions[:, None], ids.shape)
    hidden, cache = passed(program, params, visible, ids, positions, decode.cache)
    directions = _directions(hidden)  # [B, k, E]
    near = jnp.einsum("bke,bse->bks", directions, state.context, precision="highest")
    near = jnp.where(decode.mask[:, None], near, -jnp.inf).max(2)
    merits = (1 - asked.alpha) * chances - asked.alpha * near
    # A token that the rules forbid is no candidate, however few are left.
    rank = cuts.largest(jnp.where(best > -jnp.inf, merits, -jnp.inf))

    def kept(values: Array) -> Array:
        """Of `[B, k, ...]` what belongs to the chosen candidate: `[B, 1, ...]`."""
        at = rank.reshape(B, *(1,) * (values.ndim - 1))
        return jnp.take_along_axis(values, at, axis=1)

    token = marked(kept(ids)[:, 0], state.logits, scores, asked, most=False)
    token = jnp.where(decode.finished, asked.fill, token)
    cache = _moved(cache, start, rank, count)
    decode = appended(decode._replace(cache=cache, positions=decode.positions + 1), token, asked)
    context = lax.dynamic_update_slice_in_dim(state.context, kept(directions), start, axis=1)
    return State(decode, context, headed(program, params, kept(hidden)[:, 0]))


def _moved(cache: Cache, start: Array, rank: Array, count: int) -> Cache:
    """The cache with the chosen candidate in the first place of all, `start`."""

    def move(buffer: Array) -> Array:
        *front, _, width = buffer.shape
        fed = lax.dynamic_slice_in_dim(buffer, start, count, axis=-2)
        fed = fed.reshape(len(rank), -1, count, width)  # [B, H, k, D]
        one = jnp.take_along_axis(fed, rank[:, None, None, None], axis=2).reshape(*front, 1, width)
        return lax.dynamic_update_slice_in_dim(buffer, one, start, axis=buffer.ndim - 2)

    keys, values = jax.tree.map(move, (cache.keys, cache.values))
    return Cache(keys, values, start + 1)


def goes_on(state: State, asked: Asked) -> Array:
    """As `decoding.goes_on`."""
    return decoding.goes_on(state.decode, asked)


def _directions(hidden: Array) -> Array:
    hidden = hidden.astype(jnp.float32)
    lengths = jnp.sqrt(jnp.square(hidden).sum(-1, keepdims=True))
    return hidden / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
