"""The core of all strategies: prefill, step and loop, and the choice of greedy and sampled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from opt_core.generation import DecodeState, Strategy
from opt_flax.attention import Visible, choose, wide
from opt_flax.decoder import Cache, positions_of
from opt_flax.generation.cuts import draw, largest, log_probabilities
from opt_flax.generation.rules import Functions, Numbers, Text, chain, stopped

State = DecodeState[Array, Cache]

#: What stands where a token could not be chosen: the scores are not numbers, or all -inf, or one
#: that is drawn from is inf.
NAN, NOTHING, INFINITE = -2, -3, -4


@dataclass(frozen=True)
class Program:
    """What programs are compiled for besides shapes; equal where the same ones serve."""

    module: nn.Module = field(compare=False)
    #: What the module is made of. It stands for the module itself, which has no hash.
    parts: tuple[Any, ...]
    strategy: Strategy
    width: int
    capacity: int
    samples: bool
    keeps_cache: bool
    #: Beams and their groups; the candidates of a group, or of a contrastive step; the drafts of a
    #: round; the sequences that are returned of a text.
    beams: int = 1
    groups: int = 1
    candidates: int = 0
    drafts: int = 0
    returned: int = 1
    functions: Functions = field(default_factory=Functions)
    assistant: Program | None = None

    def assisted(self, module: Any, parts: tuple[Any, ...]) -> Program:
        """The same with drafts of another module."""
        return replace(self, assistant=replace(self, module=module, parts=parts))


class Asked(NamedTuple):
    """The numbers of one generation that its programs take as arguments, as host arrays.

    What is None is not asked for, and no part of the programs.
    """

    stops: Array  # int32 [n]: the stop tokens, then ids outside the vocabulary
    fill: Array  # int32 []: what follows in a row that is finished
    first: Array  # int32 []: P, the columns of the prompt
    end: Array  # int32 []: P + N, the most columns there will be
    row: Array  # int32 []: the place of the first row in the batch
    given: Numbers
    uniforms: Array | None = None  # float32 [B, W, draws, 2]: see `cuts.parts`
    guidance: Array | None = None  # float32 []
    table: Array | None = None  # int32 [n, V]: `StopTable.after`
    prompt: Array | None = None  # int32 [R, W]: as given, where passes or functions look at it
    ranking: tuple[Array, Array] | None = None  # int32 [] early_stopping, float32 [] length_penalty
    alpha: Array | None = None  # float32 []: the penalty of contrastive search
    matching: Array | None = None  # int32 []: the longest ending that is looked up


class Begun(NamedTuple):
    """What a generation starts from; the first columns of the prompt may lie in a cache."""

    ids: Any  # int32 [R, room]: the other columns, and what follows them
    shown: Any  # bool [R, S]: the real tokens of all columns
    tokens: Any  # int32 [B, W]: see `DecodeState`
    matched: Any  # int32 [B]
    past: Cache | None  # R rows
    whole: Any = None  # int32 [B, room]: all real tokens and what follows them, for an assistant


class Seen(NamedTuple):
    """What tokens were chosen from: as the model scored them, and after the rules, `[n, V]`."""

    logits: Array
    scores: Array


@partial(jax.jit, static_argnums=0)
def prefill(
    program: Program, params: Any, begun: Begun, asked: Asked
) -> tuple[State, Array, Array]:
    """Pass over the prompt: the state before the first choice, `[R, V]`, and all `[R, T, E]`.

    Columns behind the prompt are fed too, and hidden; what is chosen is written over them.
    """
    R, room = begun.ids.shape
    cache, start, keys, shown = begun.past, 0, room, begun.shown[:, :room]
    positions = positions_of(shown, room)
    if cache is not None:
        cache, start, keys = cache.grown(program.capacity), cache.length, program.capacity
        positions = positions_of(begun.shown, keys)
        positions = lax.dynamic_slice_in_dim(positions, start, room, axis=1)
        shown = lax.dynamic_slice_in_dim(begun.shown, start, room, axis=1)
        visible = Visible(start, room, keys, begun.shown)
    else:
        visible = Visible(0, room, room, shown)
        if program.keeps_cache:
            module: Any = program.module
            cache = Cache.empty(module.config, R, program.capacity, module.dtype)
    hidden, cache = passed(program, params, visible, begun.ids, positions, cache)
    if cache is not None:
        cache = Cache(cache.keys, cache.values, asked.first)
    state = State(
        tokens=begun.tokens,
        length=asked.first,
        finished=jnp.zeros(len(begun.tokens), bool),
        matched=begun.matched,
        positions=begun.shown.sum(1, dtype=jnp.int32),
        mask=begun.shown,
        cache=Cache((), (), asked.first) if cache is None else cache,
    )
    return state, scored(program, params, hidden, shown), hidden


def start(program: Program, params: Any, begun: Begun, asked: Asked) -> tuple[State, Seen]:
    """The state after the first choice."""
    state, logits, _ = prefill(program, params, begun, asked)
    return select(program, state, logits, asked)


def step(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, Seen]:
    """Feed every row's newest token, and choose the next."""
    state, logits = fed(program, params, state, asked)
    return select(program, state, logits, asked)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def fed(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, Array]:
    """Feed every row's newest token: its scores are `[R, V]`."""
    after: tuple[State, Array] = flat(_fed, program, params, state, asked)
    return after


def _fed(program: Program, params: Any, state: State, asked: Asked) -> tuple[State, Array]:
    R = len(state.positions)
    if not program.keeps_cache:
        ids = written(asked, state.tokens, every=True)
        return state, whole_pass(program, params, ids, state.mask[:, : program.width])
    visible = Visible(state.cache.length, 1, program.capacity, state.mask)
    ids, positions = twice(newest(state), R)[:, None], state.positions[:, None]  # [R, 1] twice
    hidden, cache = passed(program, params, visible, ids, positions, state.cache)
    state = state._replace(cache=cache, positions=state.positions + 1)
    return state, headed(program, params, hidden[:, -1])


def select(program: Program, state: State, logits: Array, asked: Asked) -> tuple[State, Seen]:
    """Choose the token of every row from the scores `[R, V]`, and note it."""
    combined = guided(logits, asked)
    text = Text(state.tokens, state.length, places(asked, len(state.tokens), 1), None)
    if program.functions.all:
        text = text._replace(ids=written(asked, state.tokens))
    scores = chain(program.functions, combined, text, asked.given)
    cache, state = state.cache, state._replace(cache=None)  # type: ignore[arg-type]
    state = _chosen(program, state, combined, scores, asked)
    if program.functions.criteria:
        ids = written(asked, state.tokens)
        ended = stopped(program.functions, ids, scores, state.length)
        state = state._replace(finished=state.finished | ended)
    return state._replace(cache=cache), Seen(logits[: len(scores)], scores)


@partial(jax.jit, static_argnums=0)
def _chosen(program: Program, state: State, raw: Array, scores: Array, asked: Asked) -> State:
    if program.samples:
        assert asked.uniforms is not None
        count = state.length - asked.first
        uniform = lax.dynamic_index_in_dim(asked.uniforms[:, :, 0], count, 1, keepdims=False)
        chosen = draw(scores, uniform)
    else:
        chosen = largest(scores)
    chosen = marked(chosen, raw, scores, asked, most=not program.samples)
    return appended(state, jnp.where(state.finished, asked.fill, chosen), asked)


def appended(state: State, chosen: Array, asked: Asked) -> State:
    """Note the token of every row, int32 `[B]`."""
    write = partial(lax.dynamic_update_index_in_dim, index=state.length, axis=1)
    matched, ended = ends(state.matched, chosen, asked)
    return state._replace(
        tokens=write(state.tokens, chosen),
        mask=write(state.mask, jnp.ones(len(state.mask), bool)),
        matched=jnp.where(state.finished, state.matched, matched),
        finished=state.finished | ended,
        length=state.length + 1,
    )


def ends(matched: Array, chosen: Array, asked: Asked) -> tuple[Array, Array]:
    """What of a stop string a text ends with after a token, and whether it ends: `[...]` each."""
    ended = jnp.isin(chosen, asked.stops, method="compare_all")
    if asked.table is None:
        return matched, ended
    matched = asked.table[matched, jnp.maximum(chosen, 0)]
    return matched, ended | (matched == len(asked.table) - 1)


def marked(chosen: Array, raw: Array, scores: Array, asked: Asked, *, most: bool) -> Array:
    """The chosen tokens `[n]`, or in their place why there can be none.

    `most` says whether a score may be inf.
    """
    best = scores.max(1)
    is_nan = jnp.isnan(best)
    if "remove_invalid_values" not in asked.given:
        is_nan = is_nan | jnp.isnan(raw).any(1)
    chosen = jnp.where(best == -jnp.inf, NOTHING, chosen)
    if not most:
        chosen = jnp.where(best == jnp.inf, INFINITE, chosen)
    return jnp.where(is_nan, NAN, chosen)


def newest(state: Any) -> Array:
    """The tokens `[B]`, or `[B, K]`, that were chosen last."""
    tokens: Array = lax.dynamic_index_in_dim(state.tokens, state.length - 1, -1, keepdims=False)
    return tokens


def goes_on(state: State, asked: Asked) -> Array:
    """Whether another token is asked for, bool `[]`; not after scores without a choice."""
    return (state.length < asked.end) & ~state.finished.all() & (newest(state) > NAN).all()


def loop(step: Callable[[Any], Any], goes: Callable[[Any], Array], state: Any, until: Array) -> Any:
    """All steps, until every row is finished or so many columns are settled."""
    return flat(
        lambda state: lax.while_loop(lambda s: goes(s) & (s.length < until), step, state), state
    )


def voided(tokens: Array, length: Array) -> Array:
    """After scores without a choice no token: nobody may read on as if the text ended there."""
    last = lax.dynamic_index_in_dim(tokens, length - 1, 1)
    later = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] >= length
    return jnp.where(later & (last <= NAN).any(), NAN, tokens)


def flat(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run with caches of `[B * H, S, D]` buffers where XLA's CPU compiler wants them.

    It computes products over one axis of rows; of buffers with two it makes copies in each step.
    """

    def is_cache(value: Any) -> bool:
        return isinstance(value, Cache)

    found = [x for x in jax.tree.leaves(arguments, is_leaf=is_cache) if is_cache(x) and len(x)]
    rows = {len(cache.keys[0]) for cache in found if cache.keys[0].ndim == 4}
    if jax.default_backend() != "cpu" or not rows:
        return run(*arguments)
    (B,) = rows

    def shaped(tree: Any, *front: int) -> Any:
        return jax.tree.map(
            lambda x: x.reshaped(*front) if is_cache(x) else x, tree, is_leaf=is_cache
        )

    return shaped(run(*shaped(arguments, -1)), B, -1)


def guided(logits: Array, asked: Asked) -> Array:
    """The scores of B rows from those of R, which under guidance hold each text twice."""
    if asked.guidance is None:
        return logits
    kind = wide(logits.dtype)
    told, untold = jnp.split(log_probabilities(logits.astype(kind)), 2)
    return asked.guidance.astype(kind) * (told - untold) + untold


def written(asked: Asked, tokens: Array, *, every: bool = False) -> Array:
    """The texts of B prompts as given, then what was chosen: int32 `[B * k, W]` both ways.

    With `every` those without their prompt follow: `[R * k, W]`.
    """
    assert asked.prompt is not None
    B = len(asked.prompt) // (1 if asked.guidance is None else 2)
    prompt = asked.prompt if every else asked.prompt[:B]
    prompt = jnp.repeat(prompt, len(tokens) // B, axis=0)
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where(columns < asked.first, prompt, twice(tokens, len(prompt)))


def twice(rows: Array, count: int) -> Array:
    """The rows of B texts for the R rows that are fed."""
    return rows if len(rows) == count else jnp.concatenate([rows, rows])


def places(asked: Asked, rows: int, copies: int) -> Array:
    """Which text of the batch each row belongs to, int32 `[rows]`."""
    return jnp.arange(rows, dtype=jnp.int32) // copies + asked.row


def passed(
    program: Program,
    params: Any,
    visible: Visible,
    ids: Array,
    positions: Array,
    cache: Cache | None,
) -> tuple[Array, Any]:
    """`[R, T]` ids that follow the cache -> `[R, T, E]`, and the cache that holds them."""

    def decode(module: Any) -> tuple[Array, Cache | None]:
        decoder = module.model.decoder
        attend = choose(
            module.attn_implementation,
            visible,
            dropout=0.0,
            weights=False,
            dtype=module.dtype,
            platform=jax.default_backend(),
        )
        nothing = (None,) * module.config.num_hidden_layers
        out = decoder(decoder.embed_tokens(ids), positions, attend, cache, nothing, False, True)
        return out.last, out.cache

    out: Any = program.module.apply({"params": params}, method=decode)
    return out[0], out[1]


def headed(program: Program, params: Any, last: Array) -> Array:
    """`[..., E]` hidden states -> `[..., V]`."""

    def head(module: Any) -> Any:
        tied = module.config.tie_word_embeddings
        table = module.model.decoder.embed_tokens.embedding if tied else None
        return module.lm_head(last, table)

    scores: Any = program.module.apply({"params": params}, method=head)
    return jnp.asarray(scores)


def scored(program: Program, params: Any, hidden: Array, shown: Array) -> Array:
    """What follows the last real token of every row: `[R, T, E]`, `[R, T]` -> `[R, V]`."""
    places = jnp.arange(shown.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(shown, places, 0).max(1)[:, None, None]  # [R, 1, 1]
    scores = headed(program, params, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    # A row without any token has no last one; where Python could look it was refused.
    return jnp.where(shown.any(1, keepdims=True), scores, jnp.nan)


def whole_pass(program: Program, params: Any, ids: Array, shown: Array) -> Array:
    """All columns at once, without a cache: int and bool `[R, W]` -> `[R, V]`."""
    W = ids.shape[1]
    visible, positions = Visible(0, W, W, shown), positions_of(shown, W)
    hidden, _ = passed(program, params, visible, ids, positions, None)
    return scored(program, params, hidden, shown)
