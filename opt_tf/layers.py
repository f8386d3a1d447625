"""Keras layers that start without values, and tables whose lookups never clamp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.arguments import unknown_id
from opt_core.config import ACTIVATIONS, DecoderConfig

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": tf.nn.relu,
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "relu6": tf.nn.relu6,
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "silu": tf.nn.silu,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a configuration's `activation_function` stands for."""
    return _FUNCTIONS[ACTIVATIONS[name]]


def unfilled(shape: Sequence[int], dtype: Any = None) -> Tensor:
    """An initializer that leaves memory as it is: who builds a layer gives it its values."""
    return tf.raw_ops.Empty(shape=tuple(shape), dtype=tf.as_dtype(dtype), init=False)


def rows(table: Any, places: Tensor, least: int = 0) -> Tensor:
    """Rows of a table at places from `least` on; NaN for a place that is not there.

    TensorFlow clamps such a place, reads zeros or stops, each on another device.
    """
    table = tf.convert_to_tensor(table)
    known = (places >= least) & (places < table.shape[0])
    found = _lookup(table, tf.where(known, places, tf.zeros_like(places)))
    return tf.where(known[..., None], found, tf.constant(np.nan, found.dtype))


@tf.custom_gradient
def _lookup(table: Tensor, places: Tensor) -> Any:
    """`tf.gather` with a dense gradient: a tied head adds a dense one anyway.

    TensorFlow would turn that one into slices of all rows, and optimizers would sort them.
    """

    def gradient(upstream: Tensor) -> tuple[Tensor, None]:
        flat = tf.reshape(upstream, (-1, table.shape[1]))
        return tf.math.unsorted_segment_sum(flat, tf.reshape(places, [-1]), table.shape[0]), None

    return tf.gather(table, places), gradient


class TokenEmbedding(keras.layers.Embedding):
    """The table of tokens; the padding token's row learns nothing from being looked up."""

    def __init__(self, tokens: int, width: int, padding: int | None, **options: Any) -> None:
        super().__init__(tokens, width, embeddings_initializer=unfilled, **options)
        self.padding = padding

    def call(self, ids: Tensor) -> Tensor:
        """`[B, T]` ids -> `[B, T, E]`."""
        found = rows(self.embeddings, ids)
        if self.padding is not None:
            found = tf.where((ids == self.padding)[..., None], tf.stop_gradient(found), found)
        return tf.cast(found, self.compute_dtype)


class PositionEmbedding(keras.layers.Embedding):
    """A table of learned positions whose first `offset` rows no position from 0 on reads."""

    def __init__(self, positions: int, width: int, offset: int, **options: Any) -> None:
        super().__init__(positions + offset, width, embeddings_initializer=unfilled, **options)
        self.offset = offset

    def call(self, positions: Tensor) -> Tensor:
        """`[B, T]` int positions, from 0, or -1 for padding -> `[B, T, C]`."""
        found = rows(self.embeddings, positions + self.offset, self.offset - 1)
        return tf.cast(found, self.compute_dtype)


class TiedHead(keras.layers.Layer):
    """A head that scores by the table of tokens and has no weights of its own."""

    def call(self, hidden: Tensor, table: Any) -> Tensor:
        """`[..., E]` and the table `[V, E]` -> `[..., V]`."""
        table = tf.cast(table, hidden.dtype)
        rows = tf.reshape(hidden, (-1, hidden.shape[-1]))
        # Not a tensordot, which turns the table round: at one row XLA then computes the norm before
        # it anew for each score.
        scores = tf.matmul(rows, table, transpose_b=True)
        return tf.reshape(scores, tf.concat((tf.shape(hidden)[:-1], table.shape[:1]), axis=0))


def linear(units: int, bias: bool, dtype: Any, name: str) -> keras.layers.Dense:
    """A matrix and perhaps a bias."""
    return keras.layers.Dense(
        units,
        use_bias=bias,
        kernel_initializer=unfilled,
        bias_initializer=unfilled,
        dtype=dtype,
        name=name,
    )


def product(layer: keras.layers.Dense, x: Tensor) -> Tensor:
    """`layer(x)`: `[..., in]` -> `[..., out]`, of which XLA computes one row on all cores."""
    if not _is_plain(layer) or any(count != 1 for count in x.shape[:-1]):
        return layer(x)
    x, kernel, bias = (tf.cast(part, layer.compute_dtype) for part in (x, layer.kernel, layer.bias))
    # The same number, but no sum: XLA would make the sum and the product of one row a single loop
    # on one core, which reads weights a quarter slower.
    return keras.ops.matmul(x, kernel) - (-bias)


def _is_plain(layer: keras.layers.Dense) -> bool:
    """Whether a layer is a matrix and a bias: nothing replaced, quantized or added."""
    return (
        type(layer) is keras.layers.Dense
        and layer.use_bias
        and layer.activation is keras.activations.linear
        and layer.activity_regularizer is None
        and layer.quantization_mode is None
        and not layer.lora_enabled
        and "call" not in vars(layer)
    )


def norm(config: DecoderConfig, dtype: Any, name: str) -> keras.layers.LayerNormalization:
    """A layer norm, which Keras computes in float32 at least."""
    affine = config.layer_norm_elementwise_affine
    return keras.layers.LayerNormalization(
        epsilon=config.layer_norm_eps, center=affine, scale=affine, dtype=dtype, name=name
    )


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Look for ids outside the vocabulary, where Python can look.

    Raises:
        ValueError: there is one; names it and its place.
    """
    if not tf.executing_eagerly():
        return
    found = ids.numpy()
    wrong = (found < 0) | (found >= vocab_size)
    if wrong.any():
        row, place = (int(x) for x in np.argwhere(wrong)[0])
        raise unknown_id(int(found[row, place]), row, place, vocab_size)
