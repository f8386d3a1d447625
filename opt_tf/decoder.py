"""A decoder of pre-norm or post-norm layers: its cache, embeddings, layers and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.config import DecoderConfig
from opt_tf.attention import Attend, dropped
from opt_tf.layers import PositionEmbedding, TokenEmbedding, activation, linear, norm, product

#: The seeds that one layer needs: of its attention weights, of its two residuals, of its own drop.
_SEEDS = 4


class Cache(tf.experimental.ExtensionType):
    """Keys and values of the tokens so far; reads as a tuple of `(key, value)`, `[B, H, S, D]`.

    A cache is a value: a call makes a new one and leaves the one it was given as it was. Being an
    extension type it may go into and out of `tf.function`, `tf.while_loop` and `tf.nest` (with
    `expand_composites=True`), and its tensors may be exported by name.

    Without `held` it grows: S is the number of tokens held. With `held`, an int32 scalar, shapes
    are fixed as compiled programs need: S is the capacity, `held` counts the tokens, and what
    nobody has filled is zero, since with a weight of zero NaN would still be NaN.
    """

    keys: tuple[tf.Tensor, ...] = ()
    values: tuple[tf.Tensor, ...] = ()
    # Not `X | None`: extension types know the union of `typing` alone.
    held: Optional[tf.Tensor] = None  # noqa: UP045

    @classmethod
    def of(cls, past: Any, layers: int) -> Cache | None:
        """Our own cache, or pairs per layer as a cache; None if empty.

        Raises:
            ValueError: it is none of these, or has another number of layers.
        """
        if past is None:
            return None
        cache = past if isinstance(past, Cache) else cls(*_pairs(past))
        if len(cache) and len(cache) != layers:
            raise ValueError(
                f"past_key_values has {len(cache)} layers, the model has {layers}; pass what this "
                "model returned, or one (key, value) pair per layer"
            )
        return cache if len(cache) else None

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int | Tensor, capacity: int, dtype: Any) -> Cache:
        """Room for `capacity` tokens in fixed shapes, none held yet."""
        rooms = tuple(
            tf.zeros((batch, config.heads(i), capacity, config.head_dim), dtype)
            for i in range(config.num_hidden_layers)
        )
        return cls(rooms, rooms, tf.constant(0, tf.int32))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.keys, self.values, strict=True))

    @property
    def capacity(self) -> int | Tensor:
        """S, as a tensor where only the running program knows it."""
        return size(self.keys[0], 2) if self.keys else 0

    @property
    def length(self) -> int | Tensor:
        """The number of tokens held; a tensor in fixed shapes."""
        return self.capacity if self.held is None else self.held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens held, outside a compiled program."""
        return int(self.length)

    def fixed(self, capacity: int) -> Cache:
        """This growing cache in fixed shapes, with room for `capacity` tokens."""
        room = [[0, 0], [0, 0], [0, capacity - self.capacity], [0, 0]]
        return self.mapped(lambda x: tf.pad(x, room), tf.cast(self.length, tf.int32))

    def counted(self) -> Cache:
        """The cache as it reads outside a compiled program: the tokens held, and no more."""
        if self.held is None:
            return self
        return self.mapped(lambda x: x[:, :, : self.held])

    def mapped(self, change: Callable[[Tensor], Tensor], held: Tensor | None = None) -> Cache:
        """The cache with every tensor of keys or values changed alike, in which `held` count."""
        return Cache(tuple(map(change, self.keys)), tuple(map(change, self.values)), held)

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of one layer that a call may look at, its own `k` and `v` among them.

        In fixed shapes they are written from place `held` on; the caller sees that they fit.
        """
        if not self.keys:
            return k, v
        key, value = (tf.cast(past, k.dtype) for past in self[layer])
        if self.held is None:
            return tf.concat((key, k), 2), tf.concat((value, v), 2)
        if key.shape.rank == 3:  # [B * H, S, D], as a compiled loop carries them
            k, v = (tf.reshape(new, (-1, *new.shape[2:])) for new in (k, v))
        start = (*[0] * (key.shape.rank - 2), self.held, 0)
        return keras.ops.slice_update(key, start, k), keras.ops.slice_update(value, start, v)

    def extended(self, pairs: Sequence[tuple[Tensor, Tensor]], tokens: int | Tensor) -> Cache:
        """The cache after a call of `tokens` tokens that left these pairs."""
        keys, values = zip(*pairs, strict=True)
        return Cache(keys, values, None if self.held is None else self.held + tokens)


def _pairs(past: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    try:
        pairs = [(tf.convert_to_tensor(pair[0]), tf.convert_to_tensor(pair[1])) for pair in past]
    except (TypeError, IndexError, ValueError) as fault:
        raise ValueError(
            f"past_key_values is a {type(past).__name__}; pass what a call returned, or one "
            "(key, value) pair per layer"
        ) from fault
    return tuple(k for k, _ in pairs), tuple(v for _, v in pairs)


def size(x: Tensor, axis: int) -> int | Tensor:
    """The length of an axis: an int if tracing knows it, else a scalar tensor."""
    known = x.shape[axis]
    return tf.shape(x)[axis] if known is None else known


class SelfAttention(keras.layers.Layer):
    """Attention of one layer: four projections around `attend`."""

    def __init__(self, config: DecoderConfig, layer: int, **options: Any) -> None:
        super().__init__(**options)
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        bias, policy = config.enable_bias, self.dtype_policy
        inner = config.heads(layer) * config.head_dim
        self.k_proj = linear(inner, bias, policy, "k_proj")
        self.v_proj = linear(inner, bias, policy, "v_proj")
        self.q_proj = linear(inner, bias, policy, "q_proj")
        self.out_proj = linear(config.hidden_size, bias, policy, "out_proj")

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            projection.build((None, self.config.hidden_size))
        self.out_proj.build((None, self.q_proj.units))

    def call(
        self,
        hidden: Tensor,
        attend: Attend,
        cache: Cache | None = None,
        head_mask: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """`[B, T, C]` -> `[B, T, C]`, the attention weights or None, and what a cache holds now."""
        # Before q·k: in float16 the unscaled product overflows.
        q = self._split(product(self.q_proj, hidden) * self.head_dim**-0.5)
        k, v = (self._split(product(part, hidden)) for part in (self.k_proj, self.v_proj))
        pair = None
        if cache is not None:
            k, v = pair = cache.add(self.layer, k, v)  # [B, H, S, D]
        out, weights = attend(q, k, v, seed)  # [B, H, T, D]
        if head_mask is not None:
            # A factor per head commutes with the sum over keys, so every path can honour it.
            factor = tf.cast(head_mask, out.dtype)[:, None, None]
            out = out * factor
            weights = None if weights is None else weights * factor
        out = tf.transpose(out, (0, 2, 1, 3))  # [B, T, H, D]
        joined = tf.reshape(out, (*self._places(hidden), self.q_proj.units))
        return product(self.out_proj, joined), weights, pair  # [B, T, C]

    def _split(self, x: Tensor) -> Tensor:
        heads = tf.reshape(x, (*self._places(x), x.shape[-1] // self.head_dim, self.head_dim))
        return tf.transpose(heads, (0, 2, 1, 3))  # [B, H, T, D]

    def _places(self, x: Tensor) -> tuple[int | Tensor, int | Tensor]:
        return size(x, 0), size(x, 1)


class DecoderLayer(keras.layers.Layer):
    """Self-attention and feed-forward, each beside a residual, with its norm before or after."""

    def __init__(self, config: DecoderConfig, layer: int, **options: Any) -> None:
        super().__init__(**options)
        self.norm_first, self.config = config.do_layer_norm_before, config
        bias, policy = config.enable_bias, self.dtype_policy
        self.self_attn = SelfAttention(config, layer, dtype=policy, name="self_attn")
        self.self_attn_layer_norm = norm(config, policy, "self_attn_layer_norm")
        self.fc1 = linear(config.ffn_dim, bias, policy, "fc1")
        self.fc2 = linear(config.hidden_size, bias, policy, "fc2")
        self.final_layer_norm = norm(config, policy, "final_layer_norm")
        self.function = activation(config.activation_function)

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        self.self_attn.build()
        for part in (self.self_attn_layer_norm, self.fc1, self.final_layer_norm):
            part.build((None, None, self.config.hidden_size))
        self.fc2.build((None, None, self.config.ffn_dim))

    def call(
        self,
        hidden: Tensor,
        attend: Attend,
        cache: Cache | None = None,
        head_mask: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """`[B, T, C]` -> `[B, T, C]`, the attention weights or None, and what a cache holds now.

        With `seeds` `[4, 2]` there is dropout. They are an argument, so that a second run of the
        layer for its gradient drops the same.
        """
        into = self.self_attn_layer_norm(hidden) if self.norm_first else hidden
        seed = None if seeds is None else seeds[0]
        out, weights, pair = self.self_attn(
            into, attend=attend, cache=cache, head_mask=head_mask, seed=seed
        )
        hidden = hidden + self._dropped(out, seeds, 1)
        if not self.norm_first:
            hidden = self.self_attn_layer_norm(hidden)
        into = self.final_layer_norm(hidden) if self.norm_first else hidden
        wide = self.function(product(self.fc1, into))  # [B, T, F]
        hidden = hidden + self._dropped(product(self.fc2, wide), seeds, 2)
        if not self.norm_first:
            hidden = self.final_layer_norm(hidden)
        return hidden, weights, pair

    def _dropped(self, x: Tensor, seeds: Tensor | None, which: int) -> Tensor:
        if seeds is None or not self.config.dropout:
            return x
        return dropped(x, self.config.dropout, seeds[which])


class DecoderOutput(NamedTuple):
    """The last hidden state `[B, T, E]`, what was collected on the way, and the cache after it."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cache: Cache | None


class Decoder(keras.layers.Layer):
    """Token and position embeddings, the layers, and the norm and projection that end them."""

    def __init__(self, config: DecoderConfig, **options: Any) -> None:
        super().__init__(**options)
        C, E, policy = config.hidden_size, config.word_embed_proj_dim, self.dtype_policy
        self.config = config
        #: 0: activations are kept; n: those of every n-th layer are computed again going back.
        self.checkpoint_every = 0
        self.seed_generator = keras.random.SeedGenerator()
        self.embed_tokens = TokenEmbedding(
            config.vocab_size, E, config.pad_token_id, dtype=policy, name="embed_tokens"
        )
        positions = config.max_position_embeddings
        self.embed_positions = PositionEmbedding(
            positions, C, config.position_offset, dtype=policy, name="embed_positions"
        )
        wide = config.has_projections
        self.project_out = linear(E, False, policy, "project_out") if wide else None
        self.project_in = linear(C, False, policy, "project_in") if wide else None
        self.final_layer_norm = (
            norm(config, policy, "final_layer_norm") if config.has_final_layer_norm else None
        )
        self.layers = [
            DecoderLayer(config, i, dtype=policy, name=f"layers.{i}")
            for i in range(config.num_hidden_layers)
        ]

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        self.embed_tokens.build()
        self.embed_positions.build()
        for layer in self.layers:
            layer.build()
        if self.project_out is not None and self.project_in is not None:
            self.project_out.build((None, None, self.config.hidden_size))
            self.project_in.build((None, None, self.config.word_embed_proj_dim))
        if self.final_layer_norm is not None:
            self.final_layer_norm.build((None, None, self.config.hidden_size))

    def call(
        self,
        embeds: Tensor,
        positions: Tensor,
        attend: Attend,
        cache: Cache | None = None,
        head_mask: Sequence[Tensor | None] | None = None,
        collect_states: bool = False,
        training: bool | None = None,
    ) -> DecoderOutput:
        """`[B, T, E]` embeddings and `[B, T]` or `[1, T]` positions -> `[B, T, E]`.

        Dropout acts inside layers only, never on embeddings (the published models were trained
        with `no_emb_dropout`). `Cache()` asks for a cache where there is none yet.
        """
        hidden = embeds if self.project_in is None else self.project_in(embeds)  # [B, T, C]
        hidden = hidden + self.embed_positions(positions)
        seeds = self._seeds() if training else [None] * len(self.layers)
        states, weights, pairs = [], [], []
        for i in range(len(self.layers)):
            states.append(hidden)
            factor = None if head_mask is None else head_mask[i]
            hidden, weight, pair = self._run(i, hidden, attend, cache, factor, seeds[i])
            weights.append(weight)
            if pair is not None:
                pairs.append(pair)
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)  # [B, T, E]
        return DecoderOutput(
            hidden,
            (*states, hidden) if collect_states else None,
            tuple(weights) if weights[0] is not None else None,
            None if cache is None else cache.extended(pairs, size(embeds, 1)),
        )

    def save_own_variables(self, store: Any) -> None:
        """Keep the state of dropout, so that training goes on as if it had not stopped."""
        store["seed"] = self.seed_generator.state

    def load_own_variables(self, store: Any) -> None:
        """Take up the state of dropout, if a file holds it."""
        if len(store.keys()):
            self.seed_generator.state.assign(store["seed"])

    def _seeds(self) -> Tensor:
        """Fresh seeds `[L, 4, 2]` of this call; the generator moves on in graphs and XLA too."""
        seed = tf.cast(self.seed_generator.next(), tf.int32)
        drawn = tf.random.experimental.stateless_split(seed, len(self.layers) * _SEEDS)
        return tf.reshape(drawn, (len(self.layers), _SEEDS, 2))

    def _run(
        self,
        i: int,
        hidden: Tensor,
        attend: Attend,
        cache: Cache | None,
        head_mask: Tensor | None,
        seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        layer, rate = self.layers[i], self.config.layerdrop
        rerun = seeds is not None and self.checkpoint_every and i % self.checkpoint_every == 0
        if rerun and cache is None:
            out, weights = _rerun(layer, hidden, attend, head_mask, seeds)
            pair = None
        else:
            out, weights, pair = layer(
                hidden, attend=attend, cache=cache, head_mask=head_mask, seeds=seeds
            )
        if seeds is None or not rate:
            return out, weights, pair
        # LayerDrop (arXiv 1909.11556): in training a layer is left out by chance. It is computed
        # all the same, so that a compiled program is one.
        left_out = tf.random.stateless_uniform((), seeds[3]) < rate
        if weights is not None:
            weights = tf.where(left_out, tf.zeros_like(weights), weights)
        return tf.where(left_out, hidden, out), weights, pair


def _rerun(
    layer: DecoderLayer,
    hidden: Tensor,
    attend: Attend,
    head_mask: Tensor | None,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """A layer that keeps nothing but its inputs, and is computed again going back."""

    def run(hidden: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        out, weights, _ = layer(hidden, attend=attend, head_mask=head_mask, seeds=seeds)
        return (out,) if weights is None else (out, weights)

    # What a gradient may be asked of goes in by position.
    given = (hidden,) if head_mask is None else (hidden, tf.cast(head_mask, hidden.dtype))
    out, *weights = tf.recompute_grad(run)(*given)
    return out, weights[0] if weights else None


def positions_of(mask: Tensor) -> Tensor:
    """Bool `[B, S]` mask over past and new tokens -> their positions, int32 `[B, S]`.

    A place that the mask hides gets -1 and does not count, so padding never moves a real token.
    """
    counted = tf.cast(mask, tf.int32)
    return tf.cumsum(counted, axis=1) * counted - 1
