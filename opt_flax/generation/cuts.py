"""The rules that flatten a distribution and cut its ends off, and the draw from what is left.

Nothing is sorted: a cut is found by halving the interval in which it lies, with some thirty sums
over the vocabulary, and the best of many by the best of their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

#: Sums and maxima run over blocks of this many tokens, then over the blocks.
_BLOCK = 128
#: The largest pattern of bits of a float32 that is not negative: infinity.
_MOST_BITS = 0x7F800000
#: A number as the sum of two float32, the second at most half a unit of the first's last place.
Double = tuple[Array, Array]


def parts(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Numbers of [0, 1) as two float32 that add up to them but for 2**-48: `[...]` -> `[..., 2]`.

    The first is cut off, not rounded, so that it stays below 1.
    """
    high = np.floor(numbers * 2.0**24) * 2.0**-24
    return np.stack([high, numbers - high], axis=-1).astype(np.float32)


def best(values: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of every row, the first of equals first: `[B, n]` -> `[B, count]` twice.

    Their blocks are those with the largest maxima; so few numbers are sorted, not a vocabulary.
    """
    B, n = values.shape
    rest = max(count, n) - n
    rest += -(n + rest) % _BLOCK
    blocks = jnp.pad(values, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    blocks = blocks.reshape(B, -1, _BLOCK)
    if blocks.shape[1] <= count:
        found, places = lax.top_k(blocks.reshape(B, -1), count)
        return found, jnp.minimum(places, n - 1)
    _, chosen = lax.top_k(blocks.max(2), count)
    chosen = lax.sort(chosen, dimension=1)  # [B, count]
    inside = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(B, -1)
    found, places = lax.top_k(inside, count)
    block = jnp.take_along_axis(chosen, places // _BLOCK, axis=1)
    return found, jnp.minimum(block * _BLOCK + places % _BLOCK, n - 1)


def largest(scores: Array) -> Array:
    """The place of the largest number of every row, the first of equals: `[n, V]` -> int32 `[n]`.

    In two sums that vector units can do; an argmax carries its place through every comparison.
    """
    is_best = scores == scores.max(axis=1, keepdims=True)
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    return jnp.where(is_best, ids, scores.shape[1] - 1).min(1)


def _temperature(scores: Array, text: Any, value: Array) -> Array:
    # What remove_invalid_values made finite stays so.
    most = jnp.finfo(scores.dtype).max
    return jnp.where(jnp.isfinite(scores), jnp.clip(scores / value, -most, most), scores)


def _top_k(scores: Array, text: Any, count: Array) -> Array:
    """Leave the `count` best, and those that tie with the last of them."""

    def cut(scores: Array) -> Array:
        bits = _ordered(_distance(scores))
        most = jnp.minimum(count, scores.shape[1])
        last = _least(_MOST_BITS, len(bits), lambda end: (bits <= end).sum(1, jnp.int32) >= most)
        return jnp.where(bits <= last, scores, -jnp.inf)

    return _where_asked(count > 0, cut, scores)


def _top_p(scores: Array, text: Any, mass: Array, kept: Array) -> Array:
    """Leave the smallest set of best tokens whose chances sum to `mass`, of equals the lowest."""
    mass = mass.astype(jnp.float32)

    def cut(scores: Array) -> Array:
        distance = _distance(scores)
        bits, chance = _ordered(distance), jnp.exp(-distance)
        n, V = scores.shape
        aim = mass * chance.sum(1, keepdims=True)
        worst = _least(
            _MOST_BITS, n, lambda end: jnp.where(bits <= end, chance, 0.0).sum(1) >= aim[:, 0]
        )
        ties = bits == worst
        missing = aim - jnp.where(bits < worst, chance, 0.0).sum(1, keepdims=True)
        each = jnp.where(ties, chance, 0.0).max(1, keepdims=True)
        count = jnp.ceil(missing / each).clip(1, V).astype(jnp.int32)[:, 0]
        ids = jnp.arange(V, dtype=jnp.int32)[None]
        last = _least(V, n, lambda end: (ties & (ids <= end)).sum(1, jnp.int32) >= count)
        stays = (bits < worst) | (ties & (ids <= last)) | _kept(scores, kept)
        return jnp.where(stays, scores, -jnp.inf)

    return _where_asked(mass < 1, cut, scores)


def _min_p(scores: Array, text: Any, share: Array, kept: Array) -> Array:
    """Leave the tokens with at least `share` of the best one's probability."""

    def cut(scores: Array) -> Array:
        stays = jnp.exp(-_distance(scores)) >= share.astype(jnp.float32)
        return jnp.where(stays | _kept(scores, kept), scores, -jnp.inf)

    return _where_asked(share > 0, cut, scores)


def _typical_p(scores: Array, text: Any, mass: Array, kept: Array) -> Array:
    """Leave the tokens that tell about as much as is expected (2202.00666), ties included."""
    told = -jax.nn.log_softmax(scores)
    chance = jnp.exp(-told)
    away = jnp.abs(told - _entropy(chance, told)).astype(jnp.float32)
    bits = _ordered(away)
    worst = _least(
        _MOST_BITS, len(bits), lambda end: jnp.where(bits <= end, chance, 0.0).sum(1) >= mass
    )
    return jnp.where((bits <= worst) | _kept(-away, kept), scores, -jnp.inf)


def _epsilon(scores: Array, text: Any, least: Array, kept: Array) -> Array:
    """Leave the tokens of at least this probability (2210.15191)."""
    return _above(scores, jax.nn.softmax(scores) >= least, kept)


def _eta(scores: Array, text: Any, least: Array, kept: Array) -> Array:
    """The same, but less is enough where much is possible (2210.15191)."""
    told = -jax.nn.log_softmax(scores)
    chance = jnp.exp(-told)
    bound = jnp.minimum(least, jnp.sqrt(least) * jnp.exp(-_entropy(chance, told)))
    return _above(scores, chance >= bound, kept)


def log_probabilities(scores: Array) -> Array:
    """Softmax's logarithm; beside a score of inf, or of -inf alone, none is, and scores stay."""
    is_finite = jnp.isfinite(scores.max(axis=-1, keepdims=True))
    return jnp.where(is_finite, jax.nn.log_softmax(scores), scores)


#: Every rule by its name: see `opt_flax.generation.rules`.
CUTS: Mapping[str, Callable[..., Array]] = {
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon,
    "eta_cutoff": _eta,
    "renormalize_logits": lambda scores, text: log_probabilities(scores),
}


def _where_asked(is_asked: Array, cut: Callable[[Array], Array], scores: Array) -> Array:
    """The scores after a cut; as they are where its number says that it cuts nothing."""
    left: Array = lax.cond(is_asked, cut, lambda scores: scores, scores)
    return left


def _above(scores: Array, stays: Array, kept: Array) -> Array:
    # Those that tie with the last of the kept ones stay too.
    least = jnp.where(_kept(scores, kept), scores, jnp.inf).min(1, keepdims=True)
    return jnp.where(stays | (scores >= least), scores, -jnp.inf)


def _entropy(chance: Array, told: Array) -> Array:
    return jnp.where(chance > 0, chance * told, 0.0).sum(1, keepdims=True)


def _kept(scores: Array, count: Array) -> Array:
    """The `count` best of every row, of equals the lowest: bool `[n, V]`."""
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]

    def mark(_: Array, marked: Array) -> Array:
        return marked | (ids == largest(jnp.where(marked, -jnp.inf, scores))[:, None])

    count = jnp.minimum(count, scores.shape[1])
    nothing = jnp.zeros(scores.shape, bool)
    marked: Array = lax.fori_loop(jnp.int32(0), count, mark, nothing)
    return marked


def _distance(scores: Array) -> Array:
    """How far every score lies below the best: small numbers for the likely tokens."""
    return (scores.max(axis=1, keepdims=True) - scores).astype(jnp.float32)


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
    blocks = _blocks(scores)
    return _drawn(blocks, _summed(blocks), uniform)


def drawn(scores: Array, uniforms: Array) -> tuple[Array, Array]:
    """M draws without putting back: `[B, n]`, `[B, M, 2]` -> scores and places `[B, M]`.

    Best first, of equals the first; -inf where nothing was left to draw.
    """
    (B, n), M = scores.shape, uniforms.shape[1]
    rows = jnp.arange(B, dtype=jnp.int32)
    blocks = _blocks(jnp.where(jnp.isfinite(scores.max(1, keepdims=True)), scores, 0.0))

    def take(m: Array, found: tuple[Array, Double, Array]) -> tuple[Array, Double, Array]:
        blocks, sums, chosen = found
        uniform = lax.dynamic_index_in_dim(uniforms, m, 1, keepdims=False)
        place = _drawn(blocks, sums, uniform)
        block = place // _BLOCK
        is_left = blocks[rows, block, place % _BLOCK] > 0
        blocks = blocks.at[rows, block, place % _BLOCK].set(0.0)
        rest = _summed(blocks[rows, block][:, None])
        high, low = (part.at[rows, block].set(r[:, 0]) for part, r in zip(sums, rest, strict=True))
        chosen = lax.dynamic_update_index_in_dim(chosen, jnp.where(is_left, place, n), m, 1)
        return blocks, (high, low), chosen

    start = (blocks, _summed(blocks), jnp.full((B, M), n, jnp.int32))
    _, _, chosen = lax.fori_loop(jnp.int32(0), jnp.int32(M), take, start)
    chosen = lax.sort(chosen, dimension=1)
    values = scores.at[rows[:, None], chosen].get(mode="fill", fill_value=-jnp.inf)
    values, order = lax.top_k(values, M)
    return values, jnp.minimum(jnp.take_along_axis(chosen, order, axis=1), n - 1)


def _blocks(scores: Array) -> Array:
    """Weights in blocks, `[B, V]` -> float32 `[B, blocks, 128]`."""
    B, V = scores.shape
    weights = jnp.exp((scores - scores.max(axis=1, keepdims=True)).astype(jnp.float32))
    return jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)


def _summed(blocks: Array) -> Double:
    """The sum of every block: `[B, n, 128]` -> `[B, n]` twice."""
    sums = (blocks, jnp.zeros_like(blocks))
    for width in (_BLOCK >> level for level in range(1, _BLOCK.bit_length())):
        halves = ((part[..., :width], part[..., width:]) for part in sums)
        (high, other_high), (low, other_low) = halves
        sums = _add((high, low), (other_high, other_low))
    return sums[0][..., 0], sums[1][..., 0]


def _drawn(blocks: Array, sums: Double, uniform: Array) -> Array:
    """The place of one draw in each row, int32 `[B]`."""
    up_to = _running(sums)  # [B, n] twice
    aim = _times((up_to[0][:, -1:], up_to[1][:, -1:]), uniform[:, None])
    block = _first_above(up_to, aim, sums[0])[:, None]  # [B, 1]
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]  # [B, 128]
    before = tuple(
        jnp.where(block > 0, jnp.take_along_axis(part, jnp.maximum(block - 1, 0), axis=1), 0.0)
        for part in up_to
    )
    places = _running((inside, jnp.zeros_like(inside)))
    place = _first_above(_add((before[0], before[1]), places), aim, inside)
    return block[:, 0] * _BLOCK + place


def added(high: Array, low: Array, number: Array) -> Double:
    """A number added to a sum of two parts."""
    return _add((high, low), (number, jnp.zeros_like(number)))


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
