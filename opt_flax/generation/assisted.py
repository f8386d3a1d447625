"""Assisted decoding: drafts of a smaller model, or of the text itself, settled several at a time.

The model chooses every token as without drafts, by the same rules and the same uniforms. A draft
only says how many places one pass can settle.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_core.generation import Strategy
from opt_flax.attention import Visible
from opt_flax.decoder import Cache
from opt_flax.generation import decoding
from opt_flax.generation.decoding import (
    Asked,
    Begun,
    Program,
    headed,
    newest,
    passed,
    prefill,
    select,
)
from opt_flax.generation.rules import agreement
from opt_flax.generation.setup import WHOLE, Run, Texts


class State(NamedTuple):
    """What is carried from round to round, of one row."""

    decode: decoding.State
    #: What the assistant holds: keys and values of all columns but the newest two, in slots that
    #: are those of `DecodeState.tokens`, and its mask over them. None where texts are looked up.
    cache: Cache | None
    mask: Array | None

    @property
    def length(self) -> Array:
        """As `DecodeState.length`."""
        return self.decode.length

    @property
    def tokens(self) -> Array:
        """As `DecodeState.tokens`."""
        return self.decode.tokens


def plain(run: Run) -> Run:
    """The same generation without drafts, which change no token."""
    if run.program.strategy is not Strategy.ASSISTED:
        return run
    strategy = Strategy.SAMPLING if run.program.samples else Strategy.GREEDY
    program = replace(run.program, strategy=strategy, drafts=0, assistant=None)
    return run._replace(program=program, params=run.model_params)


def row(run: Run, place: int) -> Run:
    """The same generation of one row alone."""
    one = slice(place, place + 1)
    begun, asked, texts, past = run.begun, run.asked, run.texts, run.texts.past
    past = None if past is None else past.rows(one)
    whole = None if begun.whole is None else begun.whole[one]
    drawn = None if asked.uniforms is None else asked.uniforms[one]
    prompt = None if asked.prompt is None else asked.prompt[one]
    return run._replace(
        asked=asked._replace(row=WHOLE(place), uniforms=drawn, prompt=prompt),
        begun=Begun._make([*(x[one] for x in begun[:4]), past, whole]),
        texts=Texts(texts.ids[one], texts.shown[one], past, 1),
    )


@partial(jax.jit, static_argnums=0)
def start(program: Program, params: Any, begun: Begun, asked: Asked) -> tuple[State, Any]:
    """The state after the first choice, of one row."""
    if program.assistant is None:
        state, seen = decoding.start(program, params, begun, asked)
        return State(state, None, None), seen
    state, seen = decoding.start(program, params[0], begun, asked)
    # The assistant sees the text without its padding, so that slots and columns are one.
    columns = jnp.arange(program.capacity, dtype=jnp.int32)[None]
    ids = jnp.pad(begun.tokens, ((0, 0), (0, program.capacity - program.width)))
    mask = (ids >= 0) & (columns < asked.first)
    own = Begun(begun.whole, mask, begun.tokens, begun.matched, None)
    drafting, _, _ = prefill(program.assistant, params[1], own, asked)
    return State(state, drafting.cache, mask), seen


def step(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, None]:
    """One round: drafts, one pass over all of them, and as many choices as they foresaw."""
    if program.assistant is None:
        texts = _looked_up(program, state.decode, asked)
        return state._replace(decode=_verified(program, params, state.decode, texts, asked)), None
    texts, cache = _drafted(program, program.assistant, params[1], state, asked)
    decode = _verified(program, params[0], state.decode, texts, asked)
    return state._replace(decode=decode, cache=cache), None


def goes_on(state: State, asked: Asked) -> Array:
    """As `decoding.goes_on`."""
    return decoding.goes_on(state.decode, asked)


def _looked_up(program: Program, state: decoding.State, asked: Asked) -> Array:
    """The text and what followed its longest ending where that stood last: int32 `[1, W]`."""
    assert asked.matching is not None
    W = state.tokens.shape[1]
    length = agreement(state.tokens, state.length, asked.matching)[0]  # [W]
    columns = jnp.arange(W, dtype=jnp.int32)
    place = jnp.where((length == length.max()) & (length > 0), columns, -1).max()
    behind = jnp.pad(state.tokens[0], (0, program.drafts), constant_values=-1)
    found = lax.dynamic_slice_in_dim(behind, jnp.maximum(place, 0), program.drafts)
    drafts = jnp.where(place < 0, asked.fill, jnp.maximum(found, 0))
    return lax.dynamic_update_slice(state.tokens, drafts[None], (jnp.int32(0), state.length))


def _drafted(
    program: Program, drafter: Program, params: Any, state: State, asked: Asked
) -> tuple[Array, Cache]:
    """The text with the assistant's drafts `[1, W]`, and the assistant's cache."""
    decode, cache = state.decode, state.cache
    assert cache is not None
    assert state.mask is not None
    module: Any = drafter.module
    most = module.config.max_position_embeddings - 1
    columns = jnp.arange(drafter.capacity, dtype=jnp.int32)[None]
    mask = state.mask | ((columns >= asked.first) & (columns < decode.length))
    # The last two tokens: the first of them may lie in the cache already, in the same slot.
    begin = decode.length - 2
    ids = lax.dynamic_slice_in_dim(decode.tokens, begin, 2, axis=1)
    positions = jnp.stack([decode.positions - 1, decode.positions], axis=1)  # [1, 2]
    visible = Visible(begin, 2, drafter.capacity, mask)
    fed = Cache(cache.keys, cache.values, begin)
    hidden, cache = passed(drafter, params, visible, ids, _within(positions, most), fed)
    draft = decode._replace(
        finished=jnp.zeros_like(decode.finished),
        positions=_within(decode.positions + 1, most),
        mask=mask,
        cache=cache,
    )
    draft, _ = select(drafter, draft, headed(drafter, params, hidden[:, -1]), asked)

    def goes(draft: decoding.State) -> Array:
        return decoding.goes_on(draft, asked) & (draft.length < decode.length + program.drafts)

    def guess(draft: decoding.State) -> decoding.State:
        draft, _ = decoding.step(drafter, params, draft, asked)
        return draft._replace(positions=_within(draft.positions, most))

    draft = lax.while_loop(goes, guess, draft)
    return draft.tokens, draft.cache


def _verified(
    program: Program, params: Any, state: decoding.State, texts: Array, asked: Asked
) -> decoding.State:
    """Feed the newest token and its drafts, and choose while the drafts are what is chosen."""
    module: Any = program.module
    count, begin = program.drafts + 1, state.cache.length
    ids = lax.dynamic_slice_in_dim(texts, state.length - 1, count, axis=1)
    places = jnp.arange(count, dtype=jnp.int32)[None]
    positions = state.positions[:, None] + places
    positions = _within(positions, module.config.max_position_embeddings - 1)
    columns = jnp.arange(program.capacity, dtype=jnp.int32)[None]
    visible = Visible(begin, count, program.capacity, state.mask | (columns >= asked.first))
    ids = jnp.maximum(ids, 0)
    hidden, cache = passed(program, params, visible, ids, positions, state.cache)
    logits = headed(program, params, hidden)  # [1, T, V]

    def choose(found: tuple[decoding.State, Array, Array]) -> tuple[decoding.State, Array, Array]:
        state, place, _ = found
        scores = lax.dynamic_index_in_dim(logits, place, 1, keepdims=False)
        state, _ = select(program, state, scores, asked)
        draft = lax.dynamic_index_in_dim(ids, place + 1, 1, keepdims=False)
        foreseen = (place + 1 < count) & (newest(state) == draft).all()
        return state, place + 1, foreseen & decoding.goes_on(state, asked)

    first = (state._replace(cache=Cache((), (), begin)), jnp.int32(0), jnp.array(True))
    after, chosen, _ = lax.while_loop(lambda found: found[2], choose, first)
    cache = Cache(cache.keys, cache.values, after.length - 1)
    return after._replace(cache=cache, positions=state.positions + chosen)


def _within(positions: Array, most: int) -> Array:
    """Positions of the table: drafts behind its end are never used."""
    return jnp.minimum(positions, most)
