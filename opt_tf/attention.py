"""How queries meet keys: what they may see, the plain path, and the choice of path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

#: TensorFlow has no fused kernel that holds a mask and beats its own product and softmax.
IMPLEMENTATIONS = ("eager",)

#: `[B, H, T, D]`, then `[B, H, S, D]` twice, and the seed of dropout or None -> `[B, H, T, D]`, and
#: the weights `[B, H, T, S]` if they were asked for. Queries arrive scaled.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Visible(NamedTuple):
    """Which of S keys the T queries that start at place `start` may attend to.

    `shown` is bool `[B, S]`, or None where nothing is padded; bool `[B, T, S]` says it for every
    query, in place of the order. Each count is a tensor where only the running program knows it.
    """

    start: int | Tensor
    queries: int | Tensor
    keys: int | Tensor
    shown: Tensor | None

    @property
    def needs_mask(self) -> bool:
        """Whether any query may not attend somewhere: not so for the newest token alone."""
        counts = (self.start, self.queries, self.keys)
        if self.shown is not None or not all(isinstance(count, int) for count in counts):
            return True
        return self.queries > 1 or self.start + 1 < self.keys

    def mask(self) -> Tensor:
        """Bool `[1 or B, 1, T, S]`, True where a query may attend."""
        if self.shown is not None and self.shown.shape.rank == 3:
            return self.shown[:, None]
        places = tf.range(self.queries) + self.start
        seen = tf.range(self.keys) <= places[:, None]  # [T, S]
        if self.shown is None:
            return seen[None, None]
        return seen & self.shown[:, None, None, :]  # [B, 1, T, S]


def choose(implementation: str, visible: Visible, *, dropout: float, weights: bool) -> Attend:
    """The path of one call, shared by its layers; `weights` says whether it returns them.

    The share `dropout` of the weights is dropped in a layer that hands over a seed.
    """
    assert implementation in IMPLEMENTATIONS
    mask = visible.mask() if visible.needs_mask else None
    return partial(eager, mask=mask, dropout=dropout, weights=weights)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    *,
    mask: Tensor | None,
    dropout: float,
    weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The plain path: every score is held. A query that sees nothing attends evenly."""
    scores = _product(q, k, transpose=True)  # [B, H, T, S]
    if scores.dtype != tf.float64:
        scores = tf.cast(scores, tf.float32)
    if mask is not None:
        scores = tf.where(mask, scores, scores.dtype.min)
    shares = tf.cast(tf.nn.softmax(scores), v.dtype)
    kept = shares
    if seed is not None and dropout:
        kept = dropped(shares, dropout, seed)
    return _product(kept, v, transpose=False), shares if weights else None  # [B, H, T, D]


def _product(x: Tensor, rooms: Tensor, *, transpose: bool) -> Tensor:
    """`[B, H, T, X]` by the keys or values of a call, or by rooms `[B * H, S, D]`."""
    if rooms.shape.rank == 4:
        return tf.matmul(x, rooms, transpose_b=transpose)
    B, H, T, X = x.shape
    found = tf.matmul(tf.reshape(x, (B * H, T, X)), rooms, transpose_b=transpose)
    return tf.reshape(found, (B, H, T, found.shape[-1]))


def dropped(x: Tensor, share: float, seed: Tensor) -> Tensor:
    """Dropout that depends on its seed alone; XLA draws otherwise than TensorFlow's kernels."""
    return tf.nn.experimental.stateless_dropout(x, share, seed)
