"""The decoder as generation on a CPU runs it: weights in another layout, few small operators.

It computes what the modules compute. The copy takes as much memory again as the weights, so it is
made only where it pays, and made again when a weight has changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_torch.attention import Attend
from opt_torch.decoder import Cache, Decoder, DecoderLayer, SelfAttention, activation
from opt_torch.linear import default_is_slow, is_free, operators, suits

#: Packing takes about as long as this many tokens gain by it.
WORTH_PACKING = 32

_Identity = tuple[tuple[int, ...], ...]
_Form = type["Packed"] | type["Turned"]
_PACKED: WeakKeyDictionary[nn.Module, tuple[_Identity, dict[_Form, PackedDecoder]]] = (
    WeakKeyDictionary()
)


class Packed:
    """One linear layer, packed for oneDNN; several with the same input become one product."""

    def __init__(self, *layers: nn.Linear) -> None:
        found = operators()
        assert found is not None
        self.weight = found.pack(_joined([layer.weight for layer in layers]))
        self.bias = _biases(layers)
        self._product, self._product_plus = found.product, found.product_plus

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """`[N, in]` -> `[N, out]`, with "relu" applied if asked."""
        return self._product(x, self.weight, self.bias, then, [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product and the residual `[N, out]` in one pass."""
        return self._product_plus(x, residual, self.weight, self.bias, "add")


class Turned:
    """As `Packed`, for one row: the matrix lies `[in, out]`.

    Such a product reads each weight once and is bound by that, and PyTorch's own reads matrices
    that lie so fastest, but for AMD. Of more rows, as a prompt has, the layers are faster.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.weight = _joined([layer.weight for layer in layers]).t().contiguous()
        self.bias = _biases(layers)
        self.layers = layers

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """`[N, in]` -> `[N, out]`, with "relu" applied if asked."""
        y = self._product(x)
        return y.relu_() if then == "relu" else y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product and the residual `[N, out]`."""
        return self._product(x).add_(residual)

    def _product(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            parts = [F.linear(x, layer.weight, layer.bias) for layer in self.layers]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)


def _biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return _joined(biases) if biases else None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach() for part in parts])


class _Norm(NamedTuple):
    """A layer norm's parts."""

    width: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> _Norm:
        return cls(norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.width, self.weight, self.bias, self.eps)


class _Layer:
    """One decoder layer over packed products."""

    def __init__(self, layer: DecoderLayer, form: _Form) -> None:
        config, attention = layer.config, layer.self_attn
        self.index, self.head_dim, self.norm_first = (
            attention.layer,
            attention.head_dim,
            layer.norm_first,
        )
        self.qkv = form(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.fc1, self.fc2 = form(attention.out_proj), form(layer.fc1), form(layer.fc2)
        self.attention_norm = _Norm.of(layer.self_attn_layer_norm)
        self.final_norm = _Norm.of(layer.final_layer_norm)
        self.then = "relu" if config.activation_function == "relu" else "none"
        self.activation = activation(config.activation_function)

    def __call__(self, hidden: Tensor, rows: int, attend: Attend, cache: Cache) -> Tensor:
        """`[B * T, C]` -> `[B * T, C]`."""
        into = self.attention_norm(hidden) if self.norm_first else hidden
        hidden = self.out.plus(self._attended(into, rows, attend, cache), hidden)
        if not self.norm_first:
            hidden = self.attention_norm(hidden)
        into = self.final_norm(hidden) if self.norm_first else hidden
        wide = self.fc1(into, self.then)  # [B * T, F]
        if self.then == "none":
            wide = self.activation(wide)
        hidden = self.fc2.plus(wide, hidden)
        return hidden if self.norm_first else self.final_norm(hidden)

    def _attended(self, x: Tensor, rows: int, attend: Attend, cache: Cache) -> Tensor:
        split = self.qkv(x).view(rows, x.shape[0] // rows, 3, -1, self.head_dim)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind()  # [B, H, T, D] each
        k, v = cache.add(self.index, k, v)  # [B, H, S, D]
        out, _ = attend(q * self.head_dim**-0.5, k, v)
        return out.transpose(1, 2).reshape(x.shape[0], -1)  # [B * T, A]


class PackedDecoder:
    """A decoder and its output layer, in products of one form."""

    def __init__(self, decoder: Decoder, head: nn.Linear, form: _Form) -> None:
        self.embed_positions = decoder.embed_positions
        self.project_in = decoder.project_in and form(decoder.project_in)
        self.project_out = decoder.project_out and form(decoder.project_out)
        self.final_norm = decoder.final_layer_norm and _Norm.of(decoder.final_layer_norm)
        self.layers = [_Layer(layer, form) for layer in _layers(decoder)]
        self.head = form(head)

    def __call__(self, embeds: Tensor, positions: Tensor, attend: Attend, cache: Cache) -> Tensor:
        """`[B, T, E]` embeddings and `[B, T]` positions -> `[B, T, E]`, as the modules give it."""
        B, T, E = embeds.shape
        hidden = embeds.view(B * T, E)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        hidden = hidden + self.embed_positions(positions).view(B * T, -1)  # [B * T, C]
        for layer in self.layers:
            hidden = layer(hidden, B, attend, cache)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return hidden.view(B, T, -1)


def packed(model: Any, tokens: int, one_row: bool = False) -> PackedDecoder | None:
    """The fast form of a model with `model.decoder` and `lm_head`, where it applies and pays.

    `one_row` says that a step feeds no more than one row.
    """
    decoder, head = model.model.decoder, model.lm_head
    if tokens < WORTH_PACKING or not _applies(model, decoder, head):
        return None
    turned = one_row and head.weight.dtype == torch.float32 and not default_is_slow()
    form: _Form = Turned if turned else Packed
    identity = tuple(_identity(weight) for weight in model.parameters())
    known, forms = _PACKED.get(model, (None, {}))
    if known != identity:
        _PACKED.pop(model, None)
        forms = {}
    if form not in forms:
        if not _fits(model):
            return None
        _PACKED[model] = (identity, {**forms, form: PackedDecoder(decoder, head, form)})
        forms = _PACKED[model][1]
    return forms[form]


def _applies(model: Any, decoder: nn.Module, head: nn.Module) -> bool:
    """Whether nothing about the model asks for its modules to be called one by one."""
    if not is_free() or operators() is None or model.training or not suits(head):
        return False
    if model.attn_implementation != "sdpa" or not isinstance(decoder, Decoder):
        return False
    kinds = {weight.dtype for weight in model.parameters()}
    has_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return (
        len(kinds) == 1
        and (torch.bfloat16 not in kinds or has_bfloat16)
        and all(_is_untouched(module) for module in model.modules())
    )


def _is_untouched(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    if isinstance(module, nn.Linear):
        return suits(module)
    if isinstance(module, DecoderLayer | SelfAttention):
        return type(module).forward in (DecoderLayer.forward, SelfAttention.forward)
    return True


def _layers(decoder: Decoder) -> Iterator[DecoderLayer]:
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        yield layer


def _identity(weight: Tensor) -> tuple[int, ...]:
    """What changes when a weight does, also through `.data`, which leaves no other trace.

    The wrapping sum of its bytes read as 64-bit numbers runs at the speed of memory, so checking a
    whole model costs less than two tokens.
    """
    flat = weight.detach().contiguous().view(-1)
    word = torch.int64 if flat.numel() * flat.element_size() % 8 == 0 else torch.int16
    return (weight.data_ptr(), weight.numel(), int(flat.view(word).sum()))


def _fits(model: Any) -> bool:
    """Whether memory has twice the room that the packed copy takes."""
    needed: int = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return 2 * needed <= _available()


def _available() -> float:
    try:
        with open("/proc/meminfo") as lines:
            values = dict(line.split(":") for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pages: Callable[[str], int] = getattr(os, "sysconf", lambda name: 0)
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE") / 2
