"""A decoder of pre-norm or post-norm layers: its cache, embeddings, layers and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opt_core.arguments import unknown_id
from opt_core.config import ACTIVATIONS, DecoderConfig
from opt_torch.attention import Attend
from opt_torch.linear import linear

#: A cache that must grow gets room up to the next multiple of this many tokens.
GROWTH = 128

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a configuration's `activation_function` stands for."""
    return _FUNCTIONS[ACTIVATIONS[name]]


class Cache:
    """Keys and values of the tokens so far; reads as a tuple of `(key, value)`, `[B, H, S, D]`.

    S is the number of tokens held. Behind it lie buffers that may be longer. A call never changes
    what the cache it was given reads as: `extended` gives the call a cache of its own, which writes
    behind the old one's tokens where nobody has written yet, and copies first where somebody has.

    With a tensor as `length` the shapes are fixed, as compiled programs need: S is then the
    capacity, and `length` counts the tokens held.
    """

    def __init__(self, layers: int, capacity: int = 0) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.start: int | Tensor = 0
        self.length: int | Tensor = 0
        self.capacity = capacity
        # Who takes the only entry may write behind `length`; see `extended`.
        self._right_to_write = [True]
        self._copies = False

    @classmethod
    def of(cls, past: Any, layers: int) -> Cache | None:
        """Our own cache, pairs per layer, or another library's cache with `layers`; None if empty.

        Raises:
            ValueError: it is none of these, or has another number of layers.
        """
        if past is None or isinstance(past, Cache):
            return past if past is not None and len(past) else None
        pairs = _pairs(past)
        if not pairs:
            return None
        if len(pairs) != layers:
            raise ValueError(
                f"past_key_values has {len(pairs)} layers, the model has {layers}; pass what this "
                "model returned, or one (key, value) pair per layer"
            )
        cache = cls(layers)
        cache.keys, cache.values = [k for k, _ in pairs], [v for _, v in pairs]
        cache.length = cache.capacity = pairs[0][0].shape[2]
        return cache

    def __len__(self) -> int:
        return len(self.keys) if self.keys and self.keys[0] is not None else 0

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._held(self.keys[layer]), self._held(self.values[layer])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens held."""
        return int(self.length)

    def fixed(self) -> Cache:
        """This cache with fixed shapes, over the same buffers; it takes over the right to write."""
        new = Cache(len(self.keys), self.capacity)
        new.keys, new.values = self.keys, self.values
        for buffer in (*self.keys, *self.values):
            assert buffer is not None
            # Fixed shapes read what nobody has filled; with a weight of zero NaN is still NaN.
            buffer[:, :, self.length :] = 0
        key = self.keys[0]
        assert key is not None
        new.start, new.length = torch.tensor([self.start, self.length], device=key.device).unbind()
        self._take_right_to_write()
        return new

    def counted(self) -> Cache:
        """The cache as it reads outside a compiled program: the tokens held, and no more."""
        if isinstance(self.length, int):
            return self
        new = Cache(len(self.keys), self.capacity)
        new.keys, new.values, new.length = self.keys, self.values, int(self.length)
        return new

    def extended(self, tokens: int, room: int = 0) -> Cache:
        """The cache for a call that adds tokens to this one; this one reads as before.

        If it must grow, it gets room for at least so many.
        """
        new = Cache(len(self.keys), self.capacity)
        new.keys, new.values = list(self.keys), list(self.values)
        new.start, new.length = self.length, self.length + tokens
        if isinstance(new.length, int):
            full = new.length > self.capacity
            new._copies = full or not self._take_right_to_write()
            if full and self.capacity:
                new.capacity = max(room, -(-new.length // GROWTH) * GROWTH)
        return new

    def _take_right_to_write(self) -> bool:
        # One pop, so that of two threads that continue the same cache only one succeeds.
        try:
            return self._right_to_write.pop()
        except IndexError:
            return False

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values of one layer; returns all that the call may look at."""
        key, value = self.keys[layer], self.values[layer]
        if key is None or value is None:
            key, value = self._fresh(k), self._fresh(v)
        elif torch.is_grad_enabled() and (k.requires_grad or key.requires_grad):
            # Autograd keeps what attention read; writing into it would spoil the gradient.
            self.keys[layer] = torch.cat((key[:, :, : self.start], k), dim=2)
            self.values[layer] = torch.cat((value[:, :, : self.start], v), dim=2)
            self.capacity = int(self.length)
            return self[layer]
        elif self._copies:
            key, value = self._copied(key), self._copied(value)
        self.keys[layer], self.values[layer] = self._written(key, k), self._written(value, v)
        return self[layer]

    def _fresh(self, new: Tensor) -> Tensor:
        if not self.capacity:
            return new
        B, H, _, D = new.shape
        return new.new_empty(B, H, self.capacity, D)

    def _copied(self, old: Tensor) -> Tensor:
        B, H, _, D = old.shape
        room = old.new_empty(B, H, self.capacity, D)
        room[:, :, : self.start] = old[:, :, : self.start]
        return room

    def _written(self, buffer: Tensor, new: Tensor) -> Tensor:
        if buffer is new:
            self.capacity = new.shape[2]
        elif isinstance(self.start, Tensor):
            places = torch.arange(new.shape[2], device=new.device) + self.start
            buffer.index_copy_(2, places, new)
        else:
            buffer[:, :, self.start : self.length] = new
        return buffer

    def _held(self, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise IndexError("the cache is empty: no call has written to it")
        return buffer if isinstance(self.length, Tensor) else buffer[:, :, : self.length]


def _pairs(past: Any) -> list[tuple[Tensor, Tensor]]:
    layers = getattr(past, "layers", None)
    if layers is not None:
        return [(x.keys, x.values) for x in layers if isinstance(x.keys, Tensor)]
    try:
        return [(pair[0], pair[1]) for pair in past]
    except (TypeError, IndexError) as fault:
        raise ValueError(
            f"past_key_values is a {type(past).__name__}; pass what a call returned, or one "
            "(key, value) pair per layer"
        ) from fault


class PositionEmbedding(nn.Embedding):
    """A table of learned positions whose first `offset` rows no position from 0 on reads."""

    def __init__(self, positions: int, width: int, offset: int) -> None:
        super().__init__(positions + offset, width, _weight=torch.empty(positions + offset, width))
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """`[B, T]` int positions, from 0 -> `[B, T, C]`."""
        rows: Tensor = F.embedding(positions + self.offset, self.weight)
        return rows


class SelfAttention(nn.Module):
    """Attention of one layer: four projections around `attend`."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        C, A, bias = config.hidden_size, config.heads(layer) * config.head_dim, config.enable_bias
        self.layer, self.head_dim = layer, config.head_dim
        self.k_proj = nn.Linear(C, A, bias=bias)
        self.v_proj = nn.Linear(C, A, bias=bias)
        self.q_proj = nn.Linear(C, A, bias=bias)
        self.out_proj = nn.Linear(A, C, bias=bias)

    def forward(
        self, hidden: Tensor, attend: Attend, cache: Cache | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, C]` -> `[B, T, C]` and the attention weights `[B, H, T, S]` or None."""
        # Before q·k: in float16 the unscaled product overflows.
        q = self._split(linear(self.q_proj, hidden) * self.head_dim**-0.5)
        k = self._split(linear(self.k_proj, hidden))
        v = self._split(linear(self.v_proj, hidden))
        if cache is not None:
            k, v = cache.add(self.layer, k, v)  # [B, H, S, D]
        out, weights = attend(q, k, v)  # [B, H, T, D]
        if head_mask is not None:
            # A factor per head commutes with the sum over keys, so every kernel can honour it.
            factor = head_mask.to(out.device, out.dtype)[:, None, None]
            out = out * factor
            weights = None if weights is None else weights * factor
        return linear(self.out_proj, out.transpose(1, 2).flatten(2)), weights  # [B, T, C]

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)  # [B, H, T, D]


class DecoderLayer(nn.Module):
    """Self-attention and feed-forward, each beside a residual, with its norm before or after."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        C, bias = config.hidden_size, config.enable_bias
        self.norm_first, self.config = config.do_layer_norm_before, config
        self.self_attn = SelfAttention(config, layer)
        self.self_attn_layer_norm = _norm(config)
        self.fc1 = nn.Linear(C, config.ffn_dim, bias=bias)
        self.fc2 = nn.Linear(config.ffn_dim, C, bias=bias)
        self.final_layer_norm = _norm(config)
        self.activation = activation(config.activation_function)

    def forward(
        self, hidden: Tensor, attend: Attend, cache: Cache | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, C]` -> `[B, T, C]` and the attention weights or None."""
        into = self.self_attn_layer_norm(hidden) if self.norm_first else hidden
        out, weights = self.self_attn(into, attend, cache, head_mask)
        hidden = hidden + self._dropped(out)
        if not self.norm_first:
            hidden = self.self_attn_layer_norm(hidden)
        into = self.final_layer_norm(hidden) if self.norm_first else hidden
        hidden = hidden + self._dropped(linear(self.fc2, self.activation(linear(self.fc1, into))))
        if not self.norm_first:
            hidden = self.final_layer_norm(hidden)
        return hidden, weights

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)


def _norm(config: DecoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.hidden_size,
        eps=config.layer_norm_eps,
        elementwise_affine=config.layer_norm_elementwise_affine,
    )


class DecoderOutput(NamedTuple):
    """The last hidden state `[B, T, E]`, and what was collected on the way if it was asked for."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class Decoder(nn.Module):
    """Token and position embeddings, the layers, and the norm and projection that end them."""

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        C, E = config.hidden_size, config.word_embed_proj_dim
        self.config = config
        #: 0: activations are kept; n: those of every n-th layer are computed again going back.
        self.checkpoint_every = 0
        # Without values: the weight table says how they start, and torch's own start costs time.
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, E), freeze=False, padding_idx=config.pad_token_id
        )
        self.embed_positions = PositionEmbedding(
            config.max_position_embeddings, C, config.position_offset
        )
        self.project_out = nn.Linear(C, E, bias=False) if config.has_projections else None
        self.project_in = nn.Linear(E, C, bias=False) if config.has_projections else None
        self.final_layer_norm = _norm(config) if config.has_final_layer_norm else None
        self.layers = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        attend: Attend,
        cache: Cache | None,
        head_mask: Sequence[Tensor | None],
        collect_states: bool,
    ) -> DecoderOutput:
        """`[B, T, E]` embeddings and `[B, T]` or `[1, T]` positions -> `[B, T, E]`.

        Dropout acts inside layers only, never on embeddings (the published models were trained
        with `no_emb_dropout`).
        """
        hidden = embeds if self.project_in is None else linear(self.project_in, embeds)  # [B, T, C]
        hidden = hidden + self.embed_positions(positions).to(hidden.device)
        states, weights = [], []
        for i, layer in enumerate(self.layers):
            if collect_states:
                states.append(hidden)
            if not self._skips_layer():
                hidden, weight = self._run(i, layer, hidden, attend, cache, head_mask[i])
                weights.append(weight)
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        if self.project_out is not None:
            hidden = linear(self.project_out, hidden)  # [B, T, E]
        kept = tuple(weight for weight in weights if weight is not None)
        return DecoderOutput(hidden, (*states, hidden) if collect_states else None, kept or None)

    def _skips_layer(self) -> bool:
        """LayerDrop (arXiv 1909.11556): in training a layer is left out by chance."""
        rate = self.config.layerdrop
        return self.training and rate > 0 and bool(torch.rand(()) < rate)

    def _run(self, i: int, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        if self.training and self.checkpoint_every and i % self.checkpoint_every == 0:
            result: Any = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            result = layer(*inputs)
        hidden, weights = result
        return hidden, weights


def positions_of(mask: Tensor, queries: int) -> Tensor:
    """Bool `[B, S]` mask over past and new tokens -> `[B, T]` positions of the last T.

    A place that the mask hides gets -1 and does not count, so padding never moves a real token.
    """
    counted = mask.long()
    return (counted.cumsum(1) * counted - 1)[:, -queries:]


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Look for ids outside the vocabulary, where looking does not stall an accelerator.

    Raises:
        ValueError: there is one; names it and its place.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    least, most = (int(x) for x in torch.aminmax(ids))
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        row, place = (int(x) for x in (ids == wrong).nonzero()[0])
        raise unknown_id(wrong, row, place, vocab_size)
