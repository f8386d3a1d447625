"""The parts that decoders are made of: linear maps, norms, and tables whose lookups never clamp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers

from opt_core.config import ACTIVATIONS, DecoderConfig
from opt_flax.attention import wide

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function that a configuration's `activation_function` stands for."""
    return _FUNCTIONS[ACTIVATIONS[name]]


class Part(nn.Module):
    """What every part of a decoder is told: its sizes, and the types it computes and keeps."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def linear(self, out: int, name: str | None = None, *, bias: bool) -> nn.Dense:
        """`[..., in]` -> `[..., out]`."""
        return nn.Dense(
            out,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.init_std),
            name=name,
        )


class LayerNorm(Part):
    """The layer norm of a configuration, computed in float32 at least."""

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """`[B, T, C]` -> `[B, T, C]`."""
        width, kind = (hidden.shape[-1],), wide(self.dtype)
        hidden = hidden.astype(kind)
        centred = hidden - hidden.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.config.layer_norm_eps)
        if self.config.layer_norm_elementwise_affine:
            scale = self.param("scale", initializers.ones, width, self.param_dtype).astype(kind)
            bias = self.param("bias", initializers.zeros, width, self.param_dtype).astype(kind)
            normed = normed * scale[None, None] + bias[None, None]
        return normed.astype(self.dtype)


class TokenEmbedding(Part):
    """A table of learned rows, one for each token; rows of no token are NaN."""

    def setup(self) -> None:
        """Make the table."""
        c = self.config
        shape = (c.vocab_size, c.word_embed_proj_dim)
        self.embedding = self.param("embedding", self._draw, shape, self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """`[B, T]` ids -> `[B, T, E]`; looking up padding teaches its row nothing."""
        count, pad = self.embedding.shape[0], self.config.pad_token_id
        rows = _rows(self.embedding, jnp.where(ids < 0, count, ids), self.dtype)
        is_pad = jnp.zeros_like(ids, bool) if pad is None else ids == pad
        return jnp.where(is_pad[..., None], jax.lax.stop_gradient(rows), rows)

    def _draw(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        rows = initializers.normal(self.config.init_std)(key, shape, dtype)
        pad = self.config.pad_token_id
        return rows if pad is None else rows.at[pad].set(0)


class PositionEmbedding(Part):
    """A table of learned positions whose first rows no position from 0 on reads."""

    @nn.compact
    def __call__(self, positions: Array) -> Array:
        """`[B, T]` int positions, from 0, -1 for padding -> `[B, T, C]`; NaN for no position."""
        c = self.config
        count = c.max_position_embeddings + c.position_offset
        draw = initializers.normal(self.config.init_std)
        table = self.param("embedding", draw, (count, c.hidden_size), self.param_dtype)
        rows = jnp.maximum(positions + c.position_offset, 0)
        # Compared before the offset is added, for the sum of a huge one and it has no room.
        is_none = (positions < -1) | (positions >= c.max_position_embeddings)
        return _rows(table, jnp.where(is_none, count, rows), self.dtype)


def _rows(table: Array, places: Array, dtype: Any) -> Array:
    """Rows of a table; beyond its end NaN, where JAX would silently take the last one."""
    return jnp.take(table, places, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)


class LanguageHead(Part):
    """The scores of every token; a tied one lends the embedding's rows."""

    @nn.compact
    def __call__(self, hidden: Array, embedding: Array | None = None) -> Array:
        """`[..., E]` hidden states -> `[..., V]`."""
        if embedding is not None:
            return jnp.einsum("...e,ve->...v", hidden, embedding.astype(self.dtype))
        shape = (self.config.word_embed_proj_dim, self.config.vocab_size)
        draw = initializers.normal(self.config.init_std)
        kernel: Array = self.param("kernel", draw, shape, self.param_dtype)
        return jnp.einsum("...e,ev->...v", hidden, kernel.astype(self.dtype))
