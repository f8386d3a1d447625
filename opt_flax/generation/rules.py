"""How a token is chosen and when a run ends: rules that change scores, cuts, and the draw.

Every number of a rule is an argument, so that one program serves all of them. Nothing is sorted: a
cut is found by halving the interval in which it lies, with some thirty sums over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from opt_core.generation import DecodeState, GenerationConfig, Plan, uniforms
from opt_flax.decoder import Cache, is_traced

State = DecodeState[Array, Cache]

#: What stands where a token could not be chosen, since its scores are not numbers.
NO_TOKEN = -1
#: Sums run over blocks of this many tokens, then over the blocks.
_BLOCK = 128
#: Lists of stop tokens are rounded up to multiples of this, so that programs are reused.
_STOPS = 8
#: The largest pattern of bits of a float32 that is not negative: infinity.
_MOST_BITS = 0x7F800000
#: A number as the sum of two float32, the second at most half a unit of the first's last place.
Double = tuple[Array, Array]


class Asked(NamedTuple):
    """The numbers of one generation that its programs take as arguments, as host arrays."""

    stops: Array  # int32 [n]: the stop tokens, then ids outside the vocabulary
    fill: Array  # int32 []: what follows in a row that is finished
    known: Array  # int32 []: ids from here on are never chosen
    first: Array  # int32 []: columns of the prompt
    held_back: Array  # int32 []: up to this many columns no stop token is chosen
    end: Array  # int32 []: the most columns there will be
    penalty: Array  # float32 []
    temperature: Array  # float32 []
    top_k: Array  # int32 []: 0 keeps all
    top_p: Array  # float32 []: 1 keeps all
    min_p: Array  # float32 []: 0 keeps all
    uniforms: Array  # float32 [B, S, 2] in two parts, or [B, 0, 2] for a greedy choice

    @classmethod
    def of(
        cls, generation: GenerationConfig, plan: Plan, *, rows: int, vocab_size: int, known: int
    ) -> Asked:
        """The numbers of an options' record; a rule that is not active gets what changes nothing.

        Raises:
            ValueError: the seeds do not fit the rows.
        """
        active = generation.rules

        def number(name: str, neutral: float) -> Any:
            return np.float32(getattr(generation, name) if name in active else neutral)

        count = -(-len(generation.stops) // _STOPS) * _STOPS
        stops: Any = np.full(count or _STOPS, vocab_size, np.int32)
        stops[: len(generation.stops)] = generation.stops
        steps = plan.max_new_tokens if generation.do_sample else 0
        drawn: Any = np.zeros((rows, plan.capacity if generation.do_sample else 0, 2), np.float32)
        if generation.do_sample:
            drawn[:, :steps] = parts(uniforms(generation.seed, rows, steps)[..., 0])
        P = plan.prompt_length
        whole = {
            "fill": generation.fill,
            "known": known,
            "first": P,
            "held_back": P + plan.min_new_tokens,
            "end": P + plan.max_new_tokens,
            "top_k": (generation.top_k or 0) if "top_k" in active else 0,
        }
        values: dict[str, Any] = {name: np.int32(value) for name, value in whole.items()}
        return cls(
            stops=stops,
            penalty=number("repetition_penalty", 1.0),
            temperature=number("temperature", 1.0),
            top_p=number("top_p", 1.0),
            min_p=number("min_p", 0.0),
            uniforms=drawn,
            **values,
        )


def seeded(prng_key: Any, seed: Any) -> dict[str, int]:
    """The seed that a key of `jax.random` stands for, as an option; nothing without a key.

    Raises:
        ValueError: a seed was given too, it is not one key, or its value is not known.
    """
    if prng_key is None:
        return {}
    if seed is not None:
        raise ValueError("give either prng_key or seed; found both")
    if is_traced(prng_key):
        raise ValueError(
            "prng_key is not known inside a compiled program; give a seed, or call generate "
            "outside of jax.jit"
        )
    is_typed = jnp.issubdtype(prng_key.dtype, jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(prng_key) if is_typed else prng_key)
    if words.ndim != 1 or words.dtype != np.uint32 or len(words) < 2:
        raise ValueError(f"prng_key is {words.dtype} {words.shape}; give one key of jax.random")
    return {"seed": int(words[-2]) << 32 | int(words[-1])}


def parts(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Numbers of [0, 1) as two float32 that add up to them but for 2**-48: `[...]` -> `[..., 2]`.

    The first is cut off, not rounded, so that it stays below 1.
    """
    high = np.floor(numbers * 2.0**24) * 2.0**-24
    return np.stack([high, numbers - high], axis=-1).astype(np.float32)


def newest(state: State) -> Array:
    """The tokens `[B]` that were chosen last."""
    tokens: Array = lax.dynamic_index_in_dim(state.tokens, state.length - 1, 1, keepdims=False)
    return tokens


def goes_on(state: State, asked: Asked) -> Array:
    """Whether another token is asked for, bool `[]`; not after scores that are not numbers."""
    is_whole = (newest(state) != NO_TOKEN).all()
    return (state.length < asked.end) & ~state.finished.all() & is_whole


def voided(state: State) -> State:
    """After scores that are not numbers no token: nobody may read on as if the text ended there."""
    later = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None] >= state.length
    broken = (newest(state) == NO_TOKEN).any()
    return state._replace(tokens=jnp.where(later & broken, NO_TOKEN, state.tokens))


def choice(scores: Array, state: State, asked: Asked, *, samples: bool) -> Array:
    """The next token of every row from its scores: `[B, V]` -> int32 `[B]`."""
    scores = ruled(scores, state, asked)
    best = scores.max(1)
    if samples:
        count = state.length - asked.first
        uniform = lax.dynamic_index_in_dim(asked.uniforms, count, axis=1, keepdims=False)
        chosen, is_broken = sampled(scores, asked, uniform), ~jnp.isfinite(best)
    else:
        # Of equal scores argmax takes the lowest id.
        chosen, is_broken = scores.argmax(1).astype(jnp.int32), jnp.isnan(best)
    return jnp.where(is_broken, NO_TOKEN, jnp.where(state.finished, asked.fill, chosen))


def ruled(scores: Array, state: State, asked: Asked) -> Array:
    """The scores after the rules that make tokens less likely or impossible: `[B, V]` -> `[B, V]`.

    In float32 at least. What each means stands in `opt_core.reference.rules`.
    """
    scores = scores.astype(np.promote_types(scores.dtype, np.float32))
    scores = jnp.where(jnp.arange(scores.shape[1], dtype=jnp.int32) < asked.known, scores, -jnp.inf)
    scores = lax.cond(asked.penalty != 1.0, _penalised, lambda s, *_: s, scores, state, asked)
    held_back = scores.at[:, asked.stops].set(-jnp.inf, mode="drop")
    return jnp.where(state.length < asked.held_back, held_back, scores)


def _penalised(scores: Array, state: State, asked: Asked) -> Array:
    # A hidden place writes outside the vocabulary, that is nowhere: padding may share its id with
    # a real token.
    ids = jnp.where(state.mask, state.tokens, scores.shape[1])  # [B, S]
    rows = jnp.arange(len(ids), dtype=jnp.int32)[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, ids].set(True, mode="drop")
    penalty = asked.penalty.astype(scores.dtype)
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def sampled(scores: Array, asked: Asked, uniform: Array) -> Array:
    """Draw the token of every row after temperature and cuts: `[B, V]`, `[B, 2]` -> int32 `[B]`."""
    # Distances from the best: small numbers, whose rounding does not blur the likely tokens.
    best = scores.max(axis=1, keepdims=True)
    distance = (best - scores).astype(jnp.float32) / asked.temperature
    distance = lax.cond(asked.top_k > 0, _top_k, lambda d, _: d, distance, asked.top_k)
    distance = lax.cond(asked.top_p < 1, _top_p, lambda d, _: d, distance, asked.top_p)
    distance = jnp.where(jnp.exp(-distance) < asked.min_p, jnp.inf, distance)
    return draw(-distance, uniform)


def _top_k(distance: Array, count: Array) -> Array:
    """Leave the `count` best, and those that tie with the last of them: `[B, V]` -> `[B, V]`."""
    bits = _ordered(distance)
    count = jnp.minimum(count, distance.shape[1])
    last = _least(_MOST_BITS, len(bits), lambda end: (bits <= end).sum(1, jnp.int32) >= count)
    return jnp.where(bits <= last, distance, jnp.inf)


def _top_p(distance: Array, mass: Array) -> Array:
    """Leave the smallest set of best tokens whose chances sum to `mass`: `[B, V]` -> `[B, V]`.

    Of equal tokens the lowest ids, and the best token always.
    """
    bits, chance = _ordered(distance), jnp.exp(-distance)
    B, V = distance.shape
    aim = mass * chance.sum(1, keepdims=True)
    worst = _least(
        _MOST_BITS, B, lambda end: jnp.where(bits <= end, chance, 0.0).sum(1) >= aim[:, 0]
    )
    ties = bits == worst
    missing = aim - jnp.where(bits < worst, chance, 0.0).sum(1, keepdims=True)
    each = jnp.where(ties, chance, 0.0).max(1, keepdims=True)
    count = jnp.ceil(missing / each).clip(1, V).astype(jnp.int32)[:, 0]
    ids = jnp.arange(V, dtype=jnp.int32)[None]
    last = _least(V, B, lambda end: (ties & (ids <= end)).sum(1, jnp.int32) >= count)
    return jnp.where((bits < worst) | (ties & (ids <= last)), distance, jnp.inf)


def _ordered(distance: Array) -> Array:
    """The bits of numbers that are not negative: whole numbers in the same order."""
    return lax.bitcast_convert_type(distance, jnp.int32)


def _least(most: int, rows: int, reaches: Callable[[Array], Array]) -> Array:
    """For every row the least number from 0 to `most` that `reaches`: int32 `[B, 1]`.

    A number that follows one that reaches does too; `most` is taken to.
    """

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = low + (high - low) // 2
        enough = reaches(middle)[:, None]
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = (jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), most, jnp.int32))
    found: tuple[Array, Array] = lax.fori_loop(0, most.bit_length(), halve, ends)
    return found[1]


def draw(scores: Array, uniform: Array) -> Array:
    """Inverse of the cumulative distribution in token order: `[B, V]`, `[B, 2]` -> int32 `[B]`.

    The uniform comes in two parts (see `parts`). Sums are held in two float32 each, good to 1e-13
    of the total: first over blocks, then inside the block in which the draw falls.
    """
    B, V = scores.shape
    weights = jnp.exp((scores - scores.max(axis=1, keepdims=True)).astype(jnp.float32))
    blocks = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    sums = (blocks, jnp.zeros_like(blocks))
    for width in (_BLOCK >> level for level in range(1, _BLOCK.bit_length())):
        halves = ((part[..., :width], part[..., width:]) for part in sums)
        (high, other_high), (low, other_low) = halves
        sums = _add((high, low), (other_high, other_low))
    up_to = _running((sums[0][..., 0], sums[1][..., 0]))  # [B, n] twice
    aim = _times((up_to[0][:, -1:], up_to[1][:, -1:]), uniform[:, None])
    block = _first_above(up_to, aim, sums[0][..., 0])[:, None]  # [B, 1]

    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]  # [B, 128]
    before = tuple(
        jnp.where(block > 0, jnp.take_along_axis(part, jnp.maximum(block - 1, 0), axis=1), 0.0)
        for part in up_to
    )
    places = _running((inside, jnp.zeros_like(inside)))
    place = _first_above(_add((before[0], before[1]), places), aim, inside)
    return block[:, 0] * _BLOCK + place


def _first_above(sums: Double, aim: Double, weights: Array) -> Array:
    """The first place whose sum is above the aim, or the last with a weight: `[B, n]` -> `[B]`."""
    reached = (sums[0] < aim[0]) | ((sums[0] == aim[0]) & (sums[1] <= aim[1]))
    places = jnp.arange(weights.shape[1], dtype=jnp.int32)
    last = jnp.where(weights > 0, places, 0).max(1)
    return jnp.minimum(reached.sum(1, jnp.int32), last)


def _running(numbers: Double) -> Double:
    """The sum of every number `[B, n]` and all before it."""
    n = numbers[0].shape[1]

    def add_those_before(level: Array, sums: Double) -> Double:
        behind = n - (jnp.int32(1) << level)
        high, low = (
            lax.dynamic_slice_in_dim(jnp.pad(part, ((0, 0), (n, 0))), behind, n, axis=1)
            for part in sums
        )
        return _add(sums, (high, low))

    # A loop, since as many levels one after the other take seconds to compile.
    sums: Double = lax.fori_loop(0, (n - 1).bit_length(), add_those_before, numbers)
    return sums


def _add(one: Double, other: Double) -> Double:
    """Knuth's sum of two numbers, whose error is known exactly (TAOCP 2, 4.2.2)."""
    high = one[0] + other[0]
    moved = high - one[0]
    low = (one[0] - (high - moved)) + (other[0] - moved) + (one[1] + other[1])
    return _settled(high, low)


def _times(one: Double, uniform: Array) -> Double:
    """A number times a uniform in two parts `[..., 2]`."""
    u = uniform[..., 0]
    # Heads of 12 bits: their products fit a float32 exactly, whether or not a sum is fused to them.
    heads = [
        lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & mask, jnp.float32)
        for x in (one[0], u)
        for mask in (jnp.uint32(0xFFFFF000),)
    ]
    tails = [x - head for x, head in zip((one[0], u), heads, strict=True)]
    high, low = _settled(heads[0] * heads[1], heads[0] * tails[1] + tails[0] * heads[1])
    rest = tails[0] * tails[1] + one[0] * uniform[..., 1] + one[1] * u
    return _settled(high, low + rest)


def _settled(high: Array, low: Array) -> Double:
    total = high + low
    return total, low - (total - high)
