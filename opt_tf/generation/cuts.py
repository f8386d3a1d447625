"""The cuts that leave the better tokens, draws, and the best of many, in float64 without a sort."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core import arguments

#: What is wrong with the scores of a step: nothing, they are NaN, all are -inf, or one that is to
#: be drawn from or weighed is +inf.
SOUND, NAN, NOTHING, INFINITE = range(4)

#: The errors for them, which name a length.
ERRORS = {
    NAN: arguments.nan_scores,
    NOTHING: arguments.no_token_left,
    INFINITE: arguments.infinite_scores,
}


def top_k(scores: Tensor, count: Tensor) -> Tensor:
    """Leave the `count` best tokens, and what ties with the last of them; 0 leaves all."""

    def cut() -> Tensor:
        ranks = _ranks(scores)
        return _without(ranks < _at_place(ranks, count)[:, None], scores)

    return tf.cond(count > 0, cut, lambda: scores)


def top_p(scores: Tensor, mass: Tensor, kept: Tensor) -> Tensor:
    """Leave the smallest set of best tokens whose probabilities sum to `mass` (1904.09751)."""

    def cut() -> Tensor:
        # A token stays if it and all that are no better weigh more than 1 - mass; of equals the
        # lowest id is the best. So whole levels of score stay or go, but for one.
        ranks, shares = _ranks(scores), tf.nn.softmax(scores)

        def below(level: Tensor) -> Tensor:
            return tf.reduce_sum(_where(ranks < level[:, None], shares), axis=1)

        level = _highest(lambda level: below(level) <= 1 - mass, scores)
        equals = _where(ranks == level[:, None], shares)
        up_to = below(level)[:, None] + tf.cumsum(equals, axis=1, reverse=True)
        dropped = (ranks < level[:, None]) | ((ranks == level[:, None]) & (up_to <= 1 - mass))
        return _without(dropped & ~_is_best(scores, kept), scores)

    return tf.cond(mass < 1, cut, lambda: scores)


def min_p(scores: Tensor, share: Tensor, kept: Tensor) -> Tensor:
    """Leave the tokens with at least `share` of the best one's probability (2407.01082)."""

    def cut() -> Tensor:
        shares = tf.nn.softmax(scores)
        dropped = shares < share * tf.reduce_max(shares, axis=1, keepdims=True)
        return _without(dropped & ~_is_best(scores, kept), scores)

    return tf.cond(share > 0, cut, lambda: scores)


def typical_p(scores: Tensor, mass: Tensor, kept: Tensor) -> Tensor:
    """Leave the tokens nearest to the expected information, up to a mass (2202.00666)."""
    shares, information = _informed(scores)
    entropy = tf.reduce_sum(_where(shares > 0, shares * information), axis=1, keepdims=True)
    ranks = _ranks(tf.abs(information - entropy))

    def is_short(level: Tensor) -> Tensor:
        is_nearer = ranks < level[:, None]
        weight = tf.reduce_sum(_where(is_nearer, shares), axis=1)
        count = tf.reduce_sum(tf.cast(is_nearer, tf.int32), axis=1)
        return (weight < mass) | (count < kept)

    return _without(ranks > _highest(is_short, scores)[:, None], scores)


def epsilon_cutoff(scores: Tensor, least: Tensor, kept: Tensor) -> Tensor:
    """Leave the tokens of at least this probability (2210.15191)."""
    return _unlikely_out(scores, tf.nn.softmax(scores), least, kept)


def eta_cutoff(scores: Tensor, least: Tensor, kept: Tensor) -> Tensor:
    """Leave the tokens of a probability that falls with the entropy (2210.15191)."""
    shares, information = _informed(scores)
    entropy = tf.reduce_sum(_where(shares > 0, shares * information), axis=1, keepdims=True)
    return _unlikely_out(scores, shares, tf.minimum(least, tf.sqrt(least) * tf.exp(-entropy)), kept)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in token order: `[B, V]`, `[B]` -> int32 `[B]`."""
    best = tf.reduce_max(scores, axis=1, keepdims=True)
    cumulative = tf.cumsum(tf.exp(scores - best), axis=1)  # [B, V]
    is_beyond = cumulative > uniform[:, None] * cumulative[:, -1:]
    return tf.argmax(is_beyond, axis=1, output_type=tf.int32)


def likeliest(scores: Tensor) -> Tensor:
    """The best token of every row, of equals the lowest id: int32 `[B]`."""
    return tf.argmax(scores, axis=1, output_type=tf.int32)


def chosen_of(scores: Tensor, uniforms: Tensor | None, column: Tensor) -> Tensor:
    """The token of every row for a column, drawn or the likeliest: int32 `[B]`."""
    if uniforms is None:
        return likeliest(scores)
    return draw(scores, tf.gather(uniforms, column, axis=1)[:, 0])


def log_probabilities(scores: Tensor) -> Tensor:
    """Softmax's logarithm; beside a score of inf, or of -inf alone, none is, and scores stay."""
    is_finite = tf.math.is_finite(tf.reduce_max(scores, axis=-1, keepdims=True))
    return tf.where(is_finite, tf.nn.log_softmax(scores), scores)


def fault_of(
    raw: Tensor, scores: Tensor, changed: Tensor, chosen: Tensor, *, is_mended: bool, is_drawn: bool
) -> Tensor:
    """What is wrong with the scores of each text, as int32 `[B]`.

    They are `raw` `[R, V]` of the model, `[B, V]` before the rules and after them; a `chosen` token
    is there. Rules that mend NaN make what was before them good.
    """
    best = tf.gather(changed, chosen, batch_dims=1)
    is_nan = tf.reduce_any(tf.math.is_nan(changed), axis=1)
    if not is_mended:
        is_nan |= tf.reduce_any(tf.math.is_nan(scores), axis=1)
    found = tf.where(is_nan, NAN, tf.where(best == -np.inf, NOTHING, SOUND))
    if is_drawn:
        is_infinite = has_infinite(raw, changed, is_nan, is_mended=is_mended)
        found = tf.where(is_infinite, INFINITE, found)
    return found


def has_infinite(raw: Tensor, changed: Tensor, is_nan: Tensor, *, is_mended: bool) -> Tensor:
    """Whether a score of each text is +inf after the rules, or NaN for that reason: bool `[B]`."""
    B = is_nan.shape[0]

    def some(scores: Tensor) -> Tensor:
        # With guidance a text has two rows.
        each = tf.reshape(scores == np.inf, (scores.shape[0] // B, B, -1))
        return tf.reduce_any(each, axis=(0, 2))

    found = some(changed)
    return found if is_mended else found | (is_nan & some(raw))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of `[B, X]`, of equals the first: values and places `[B, count]`.

    XLA sorts slowly. The best lie in the blocks whose best are the best, of which there are few.
    """
    X = scores.shape[1]
    size = isqrt(X // count)
    if size < 8:
        values, places = tf.math.top_k(scores, count)
        return values, places
    blocks = -(-X // size)
    lowest = tf.constant(-np.inf, scores.dtype)
    padded = tf.pad(scores, [[0, 0], [0, blocks * size - X]], constant_values=lowest)
    padded = tf.reshape(padded, (-1, blocks, size))
    _, chosen = tf.math.top_k(tf.reduce_max(padded, axis=2), count)
    # In the order of their places, so that of equals the first comes first again.
    chosen = tf.sort(chosen, axis=1)
    found = tf.reshape(tf.gather(padded, chosen, batch_dims=1), (-1, count * size))
    values, places = tf.math.top_k(found, count)
    return values, tf.gather(chosen, places // size, batch_dims=1) * size + places % size


def draw_several(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws without replacement from `[B, X]`, best first: values and places `[B, M]`.

    Each uniform of `[B, M]` draws from what those before it have left, in the order of places.
    Where nothing is left the value is -inf.
    """
    B, M = uniforms.shape
    X = scores.shape[1]
    size = isqrt(X) + 1
    blocks = -(-X // size)
    highest = tf.reduce_max(scores, axis=1, keepdims=True)
    weights = tf.exp(scores - tf.where(highest > -np.inf, highest, tf.zeros_like(highest)))
    weights = tf.pad(weights, [[0, 0], [0, blocks * size - X]])
    places = tf.range(blocks * size)

    def one_more(m: Tensor, left: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = tf.reshape(left, (B, blocks, size))
        sums = tf.reduce_sum(parts, axis=2)
        edges = tf.cumsum(sums, axis=1)
        target = tf.gather(uniforms, m, axis=1) * edges[:, -1]
        block = _first_beyond(edges, sums, target)
        inner = tf.gather(parts, block, batch_dims=1)
        before = tf.gather(edges - sums, block, batch_dims=1)
        place = _first_beyond(tf.cumsum(inner, axis=1), inner, target - before) + block * size
        # Nothing is left: a place beyond all.
        place = tf.where(edges[:, -1] > 0, place, blocks * size)
        left = _where(places != place[:, None], left)
        return m + 1, left, tf.where(tf.range(M) == m, place[:, None], drawn)

    start = (tf.constant(0), weights, tf.zeros((B, M), tf.int32))
    *_, drawn = tf.while_loop(lambda m, *_: m < M, one_more, start)
    # In the order of their places, so that of equals the first comes first.
    drawn = tf.sort(drawn, axis=1)
    values = tf.gather(scores, tf.minimum(drawn, X - 1), batch_dims=1)
    values = tf.where(drawn < X, values, tf.constant(-np.inf, scores.dtype))
    values, order = tf.math.top_k(values, M)
    return values, tf.gather(tf.minimum(drawn, X - 1), order, batch_dims=1)


def _first_beyond(cumulative: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The first place of a weight whose sum is beyond a target, else the last: int32 `[B]`."""
    has_weight = weights > 0
    is_beyond = (cumulative > target[:, None]) & has_weight
    first = tf.argmax(is_beyond, axis=1, output_type=tf.int32)
    last = tf.reduce_max(tf.where(has_weight, tf.range(weights.shape[1]), 0), axis=1)
    return tf.where(tf.reduce_any(is_beyond, axis=1), first, last)


def _without(dropped: Tensor, scores: Tensor) -> Tensor:
    return tf.where(dropped, tf.constant(-np.inf, scores.dtype), scores)


def _unlikely_out(scores: Tensor, shares: Tensor, least: Tensor, kept: Tensor) -> Tensor:
    ranks = _ranks(scores)
    worse = ranks < _at_place(ranks, kept)[:, None]
    return _without((shares < least) & worse, scores)


def _informed(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and their negative logarithms, `[B, V]` twice."""
    logarithms = tf.nn.log_softmax(scores)
    return tf.exp(logarithms), -logarithms


def _where(kept: Tensor, values: Tensor) -> Tensor:
    """The values that are kept, and 0 elsewhere."""
    return tf.where(kept, values, tf.zeros_like(values))


def _is_best(scores: Tensor, count: Tensor) -> Tensor:
    """Bool `[B, V]`: the `count` best tokens of every row, of equals the lowest ids."""

    def only_one() -> Tensor:
        return tf.range(scores.shape[1]) == likeliest(scores)[:, None]

    def several() -> Tensor:
        ranks = _ranks(scores)
        level = _at_place(ranks, count)[:, None]
        better = tf.cast(ranks > level, tf.int32)
        equals = tf.cast(ranks == level, tf.int32)
        place = tf.reduce_sum(better, axis=1, keepdims=True) + tf.cumsum(equals, axis=1)
        return (ranks > level) | ((ranks == level) & (place <= count))

    return tf.cond(count == 1, only_one, several)


def _ranks(scores: Tensor) -> Tensor:
    """Whole numbers in the order of float64 scores: int64 `[B, V]`."""
    # -0.0 equals 0.0, but its bits do not.
    bits = tf.bitcast(_where(scores != 0, scores), tf.int64)
    return tf.where(bits < 0, tf.bitwise.bitwise_xor(bits, tf.int64.max), bits)


def _at_place(ranks: Tensor, count: Tensor) -> Tensor:
    """The rank of the token at place `count`, counted from the best: int64 `[B]`."""

    def is_low_enough(level: Tensor) -> Tensor:
        return tf.reduce_sum(tf.cast(ranks >= level[:, None], tf.int32), axis=1) >= count

    return _highest(is_low_enough, ranks)


def _highest(holds: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """The highest rank of which `holds` is true in each row: int64 `[B]`; true below, not above.

    One pass over the scores for each bit is several times faster than XLA's sort, and takes any
    count.
    """
    one = tf.constant(1, tf.int64)

    def refine(bit: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        # Adding the highest bit to the lowest number wraps round to 0.
        higher = level + tf.bitwise.left_shift(one, bit)
        return bit - 1, tf.where(holds(higher), higher, level)

    start = tf.fill((scores.shape[0],), tf.int64.min)
    bits = tf.constant(63, tf.int64)
    _, level = tf.while_loop(lambda bit, _: bit >= 0, refine, (bits, start))
    return level
