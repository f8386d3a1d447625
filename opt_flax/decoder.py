"""A decoder of pre-norm or post-norm layers: its cache, embeddings, layers and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from opt_core.config import DecoderConfig
from opt_flax.attention import Attend
from opt_flax.layers import LayerNorm, Part, PositionEmbedding, TokenEmbedding, activation


def is_traced(value: Any) -> bool:
    """Whether a value is known only when a compiled program runs, or never (`jax.eval_shape`)."""
    return isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of the tokens so far; reads as a tuple of `(key, value)`, `[B, H, S, D]`.

    A tree of arrays: one buffer `[B, H, capacity, D]` for the keys and one for the values of every
    layer, and the number of tokens held. Outside a compiled program S is that number; inside, where
    it is not known, S is the capacity. Places that nobody has filled hold zeros.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Any

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, capacity: int, dtype: Any) -> Cache:
        """Room for `capacity` tokens in every one of `batch` rows."""
        heads = [config.heads(layer) for layer in range(config.num_hidden_layers)]
        keys, values = (
            tuple(jnp.zeros((batch, H, capacity, config.head_dim), dtype) for H in heads)
            for _ in range(2)
        )
        return cls(keys, values, jnp.zeros((), jnp.int32))

    @classmethod
    def of(cls, past: Any, layers: int) -> Cache | None:
        """Our own cache, or full `(key, value)` pairs per layer; None for no pairs.

        Raises:
            ValueError: it is none of these, or has another number of layers.
        """
        cache = past if past is None or isinstance(past, Cache) else cls._of_pairs(past)
        if cache is not None and len(cache) != layers:
            raise ValueError(
                f"past_key_values has {len(cache)} layers, the model has {layers}; pass what this "
                "model returned, or one (key, value) pair per layer"
            )
        return cache

    @classmethod
    def _of_pairs(cls, past: Any) -> Cache | None:
        try:
            pairs = [(jnp.asarray(pair[0]), jnp.asarray(pair[1])) for pair in past]
        except (TypeError, IndexError, KeyError, ValueError) as fault:
            raise ValueError(
                f"past_key_values is a {type(past).__name__}; pass what a call returned, or one "
                "(key, value) pair per layer"
            ) from fault
        if not pairs:
            return None
        keys, values = zip(*pairs, strict=True)
        # NumPy's: an array made inside a program would hide the number from Python.
        return cls(keys, values, np.int32(keys[0].shape[2]))

    @property
    def capacity(self) -> int:
        """How many tokens the buffers have room for."""
        return self.keys[0].shape[-2]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Array, Array]:
        return self._held(self.keys[layer]), self._held(self.values[layer])

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return map(self.__getitem__, range(len(self)))

    def grown(self, capacity: int) -> Cache:
        """The same tokens in buffers with at least this much room."""
        rest = ((0, 0), (0, 0), (0, max(0, capacity - self.capacity)), (0, 0))
        keys, values = jax.tree.map(lambda x: jnp.pad(x, rest), (self.keys, self.values))
        return Cache(keys, values, self.length)

    def rows(self, chosen: Any) -> Cache:
        """The same tokens of some rows."""
        keys, values = jax.tree.map(lambda x: x[chosen], (self.keys, self.values))
        return Cache(keys, values, self.length)

    def reshaped(self, *front: int) -> Cache:
        """The same buffers with other axes in front of `[S, D]`."""
        keys, values = jax.tree.map(
            lambda x: x.reshape(*front, *x.shape[-2:]), (self.keys, self.values)
        )
        return Cache(keys, values, self.length)

    def _held(self, buffer: Array) -> Array:
        if is_traced(self.length) or is_traced(buffer):
            return buffer
        return buffer[:, :, : int(self.length)]


#: The buffers of one layer `[B, H, S, D]`, and where the newest tokens go in them.
Past = tuple[Array, Array, Array]


class SelfAttention(Part):
    """Attention of one layer: four projections around `attend`."""

    layer: int = 0
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, hidden: Array, attend: Attend, past: Past | None, head_mask: Array | None
    ) -> tuple[Array, Array | None, tuple[Array, Array]]:
        """`[B, T, C]` -> `[B, T, C]`, the weights `[B, H, T, S]` or None, keys and values."""
        c, bias = self.config, self.config.enable_bias
        width = c.heads(self.layer) * c.head_dim
        # Before q·k: in float16 the unscaled product overflows.
        q = self._split(self.linear(width, "q_proj", bias=bias)(hidden) * c.head_dim**-0.5)
        k = self._split(self.linear(width, "k_proj", bias=bias)(hidden))
        v = self._split(self.linear(width, "v_proj", bias=bias)(hidden))
        if past is not None:
            keys, values, start = past
            k, v = _written(keys, k, start), _written(values, v, start)
        drops = not self.deterministic and c.attention_dropout > 0
        out, weights = attend(q, k, v, self.make_rng("dropout") if drops else None)  # [B, H, T, D]
        if head_mask is not None:
            # A factor per head commutes with the sum over keys, so every kernel can honour it.
            factor = head_mask.astype(out.dtype)[None, :, None, None]
            out = out * factor
            weights = None if weights is None else weights * factor
        merged = out.swapaxes(1, 2).reshape(*hidden.shape[:2], width)
        out = self.linear(c.hidden_size, "out_proj", bias=bias)(merged)  # [B, T, C]
        return out, weights, (k, v)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)  # [B, H, T, D]


def _written(buffer: Array, new: Array, start: Array) -> Array:
    """A buffer with new tokens `[B, H, T, D]`; it may have rows and heads along one axis."""
    new = new.reshape(*buffer.shape[:-2], *new.shape[-2:])
    axis = buffer.ndim - 2
    return jax.lax.dynamic_update_slice_in_dim(buffer.astype(new.dtype), new, start, axis)


class DecoderLayer(Part):
    """Self-attention and feed-forward, each beside a residual, with its norm before or after."""

    layer: int = 0
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, hidden: Array, attend: Attend, past: Past | None, head_mask: Array | None
    ) -> tuple[Array, Array | None, tuple[Array, Array]]:
        """`[B, T, C]` -> `[B, T, C]`, the attention weights or None, keys and values."""
        c, first, bias = self.config, self.config.do_layer_norm_before, self.config.enable_bias
        rest = (self.dtype, self.param_dtype)
        attention = SelfAttention(c, *rest, self.layer, self.deterministic, name="self_attn")
        attention_norm = LayerNorm(c, *rest, name="self_attn_layer_norm")
        into = attention_norm(hidden) if first else hidden
        out, weights, pair = attention(into, attend, past, head_mask)
        hidden = hidden + self._dropped(out)
        if not first:
            hidden = attention_norm(hidden)
        last_norm = LayerNorm(c, *rest, name="final_layer_norm")
        into = last_norm(hidden) if first else hidden
        out = activation(c.activation_function)(self.linear(c.ffn_dim, "fc1", bias=bias)(into))
        hidden = hidden + self._dropped(self.linear(c.hidden_size, "fc2", bias=bias)(out))
        if not first:
            hidden = last_norm(hidden)
        return hidden, weights, pair

    def _dropped(self, x: Array) -> Array:
        out: Array = nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)
        return out


class DecoderOutput(NamedTuple):
    """The last hidden state `[B, T, E]`, what was collected on the way, and the longer cache."""

    last: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None
    cache: Cache | None


class DecoderLayers(Part):
    """The stack of layers, each under its number."""

    checkpoint_every: int = 0

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        attend: Attend,
        cache: Cache | None,
        head_mask: Sequence[Array | None],
        collect_states: bool,
        deterministic: bool,
    ) -> DecoderOutput:
        """`[B, T, C]` -> `[B, T, C]`; the states are what goes into each layer."""
        collected: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        states, weights, pairs = collected
        for i, factors in enumerate(head_mask):
            if collect_states:
                states.append(hidden)
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.length)
            before = hidden
            hidden, weight, pair = self._layer(i, deterministic)(before, attend, past, factors)
            if not deterministic and self.config.layerdrop > 0:
                hidden, weight = self._skipped(before, hidden, weight)
            weights.append(weight)
            pairs.append(pair)
        kept = tuple(weight for weight in weights if weight is not None)
        if cache is not None:
            keys, values = zip(*pairs, strict=True)
            cache = Cache(keys, values, cache.length + hidden.shape[1])
        return DecoderOutput(hidden, tuple(states) or None, kept or None, cache)

    def _layer(self, i: int, deterministic: bool) -> Any:
        again = self.checkpoint_every > 0 and not deterministic and i % self.checkpoint_every == 0
        kind: Any = nn.remat(DecoderLayer) if again else DecoderLayer
        return kind(self.config, self.dtype, self.param_dtype, i, deterministic, name=str(i))

    def _skipped(
        self, before: Array, after: Array, weight: Array | None
    ) -> tuple[Array, Array | None]:
        """LayerDrop (arXiv 1909.11556): in training a layer is left out by chance."""
        key = self.make_rng("layerdrop" if self.has_rng("layerdrop") else "dropout")
        stays = jax.random.bernoulli(key, 1.0 - self.config.layerdrop)
        kept = None if weight is None else jnp.where(stays, weight, 0.0)
        return jnp.where(stays, after, before), kept


class Decoder(Part):
    """Token and position embeddings, the layers, and the norm and projection that end them."""

    #: 0: activations are kept; n: those of every n-th layer are computed again going back.
    checkpoint_every: int = 0

    def setup(self) -> None:
        """Make the parts."""
        c = self.config
        rest = (self.dtype, self.param_dtype)
        self.embed_tokens = TokenEmbedding(c, *rest)
        self.embed_positions = PositionEmbedding(c, *rest)
        if c.has_projections:
            self.project_out = self.linear(c.word_embed_proj_dim, bias=False)
            self.project_in = self.linear(c.hidden_size, bias=False)
        if c.has_final_layer_norm:
            self.final_layer_norm = LayerNorm(c, *rest)
        self.layers = DecoderLayers(c, *rest, self.checkpoint_every)

    def __call__(
        self,
        embeds: Array,
        positions: Array,
        attend: Attend,
        cache: Cache | None,
        head_mask: Sequence[Array | None],
        collect_states: bool,
        deterministic: bool,
    ) -> DecoderOutput:
        """`[B, T, E]` embeddings and `[B, T]` or `[1, T]` positions -> `[B, T, E]`.

        The new keys and values are written into the cache behind those that it holds; without room
        for them every result is NaN. Dropout acts inside layers only, never on embeddings (the
        published models were trained with `no_emb_dropout`). In training it reads the random
        streams "dropout" and "layerdrop".
        """
        c = self.config
        hidden = embeds.astype(self.dtype)
        if c.has_projections:
            hidden = self.project_in(hidden)  # [B, T, C]
        hidden = hidden + self.embed_positions(positions)
        if cache is not None:
            # A write beyond the end would be moved to fit, over tokens that are still needed.
            fits = (cache.length >= 0) & (cache.length <= cache.capacity - embeds.shape[1])
            hidden = jnp.where(fits, hidden, jnp.nan)
        out = self.layers(hidden, attend, cache, head_mask, collect_states, deterministic)
        hidden = self.final_layer_norm(out.last) if c.has_final_layer_norm else out.last
        if c.has_projections:
            hidden = self.project_out(hidden)  # [B, T, E]
        states = (*out.hidden_states, hidden) if out.hidden_states else None
        return out._replace(last=hidden, hidden_states=states)


def positions_of(mask: Array, queries: int) -> Array:
    """Bool `[B, S]` mask over past and new tokens -> int `[B, T]` positions of the last T.

    A place that the mask hides gets -1 and does not count, so padding never moves a real token.
    """
    counted = mask.astype(jnp.int32)
    return (jnp.cumsum(counted, axis=1) * counted - 1)[:, -queries:]
