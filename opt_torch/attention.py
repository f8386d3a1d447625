"""How queries meet keys: what they may see, the kernels, and the choice of kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")

#: `[B, H, T, D]`, then `[B, H, S, D]` twice -> `[B, H, T, D]`, and the weights `[B, H, T, S]` or
#: None. Queries arrive scaled.
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class Visible(NamedTuple):
    """Which of S keys the T queries that start at place `start` may attend to.

    `shown` is bool `[B, S]`, or None where nothing is padded. `start` is a tensor where the
    keys lie in a buffer of fixed length S. Where `sees` is given, bool `[B, T, S]`, it says alone
    which keys each query may attend to, at least one each, in the place of the causal order.
    """

    start: int | Tensor
    queries: int
    keys: int
    shown: Tensor | None
    sees: Tensor | None = None

    @property
    def needs_mask(self) -> bool:
        """Whether a kernel that knows "causal" and "everything" must be told more."""
        if self.shown is not None or self.sees is not None or isinstance(self.start, Tensor):
            return True
        return self.queries > 1 and self.queries != self.keys

    def mask(self, device: torch.device) -> Tensor:
        """Bool `[1 or B, 1, T, S]`, True where a query may attend."""
        if self.sees is not None:
            return self.sees.to(device)[:, None]
        places = torch.arange(self.queries, device=device) + self.start
        seen = torch.arange(self.keys, device=device) <= places[:, None]  # [T, S]
        if self.shown is None:
            return seen[None, None]
        return seen & self.shown.to(device)[:, None, None, :]  # [B, 1, T, S]


def choose(
    implementation: str,
    visible: Visible,
    *,
    dropout: float,
    weights: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Attend:
    """The kernel of one call, shared by its layers.

    A call that wants the weights themselves runs the plain path, since fused kernels never hold
    them. Without padding no mask tensor is built, so that fused kernels keep their causal path.

    Raises:
        ValueError: flash attention was chosen and cannot run this call.
    """
    if implementation == "flash_attention_2":
        _refuse_flash(dtype, device, weights, visible)
        return _flash(visible, dropout=dropout, device=device)
    if implementation == "eager" or weights:
        return partial(eager, mask=visible.mask(device), dropout=dropout)
    if not visible.needs_mask:
        unmasked = partial(sdpa, mask=None, blind=None, dropout=dropout)
        # A branch, since under torch.compile the comparison may be symbolic and the kernel wants
        # a plain bool.
        if visible.queries > 1:
            return partial(unmasked, causal=True)
        return partial(unmasked, causal=False)
    mask = visible.mask(device)
    return partial(sdpa, mask=mask, blind=_blind(visible, mask), causal=False, dropout=dropout)


def eager(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    """The plain path: every score is held. A query that sees nothing attends evenly."""
    scores = torch.matmul(q, k.transpose(-1, -2))  # [B, H, T, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~mask.to(q.device), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.matmul(F.dropout(weights, dropout), v), weights  # [B, H, T, D]


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    blind: Tensor | None,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, None]:
    """PyTorch's fused attention; `blind` queries `[B, 1, T, 1]` see nothing and attend evenly."""
    mask = None if mask is None else mask.to(q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=1.0
    )
    if blind is not None:
        # The kernel gives them zeros; a loss may read them (padding before the first token).
        out = torch.where(blind.to(q.device), v.mean(2, keepdim=True), out)
    return out, None


def _blind(visible: Visible, mask: Tensor) -> Tensor | None:
    """Bool `[B, 1, T, 1]`, the queries that may attend nowhere; None if there is none."""
    if visible.shown is None or visible.sees is not None:
        return None
    blind = ~mask.any(-1, keepdim=True)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(blind.any()):
        return None
    return blind


def _refuse_flash(
    dtype: torch.dtype, device: torch.device, weights: bool, visible: Visible
) -> None:
    if weights:
        raise ValueError(
            "flash_attention_2 never holds the attention weights, so output_attentions cannot be "
            'honoured; load the model with attn_implementation="eager" or "sdpa"'
        )
    if visible.sees is not None and visible.queries > 1:
        raise ValueError(
            "flash_attention_2 knows the causal order alone, so beams and contrastive search "
            'cannot run on it; load the model with attn_implementation="sdpa"'
        )
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash_attention_2 needs float16 or bfloat16 on a CUDA device, found {dtype} on "
            f'{device.type}; convert the model, or use attn_implementation="sdpa"'
        )


def _varlen_kernel(dropout: float) -> Callable[..., Any]:
    """The packed-rows kernel: `flash_attn` if installed, else the one inside PyTorch.

    Raises:
        ValueError: attention dropout is wanted and only PyTorch's kernel, which has none, is there.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        if dropout:
            raise ValueError(
                "attention dropout under flash_attention_2 needs the package flash_attn; install "
                'it, set attention_dropout to 0, or use attn_implementation="sdpa"'
            ) from None
        # A window of (-1, 0) is "causal, aligned to the last key".
        return partial(varlen_attn, scale=1.0, window_size=(-1, 0))
    return partial(flash_attn_varlen_func, dropout_p=dropout, softmax_scale=1.0, causal=True)


class _Packing(NamedTuple):
    """Real tokens of a padded batch, one after the other."""

    rows: Tensor  # int [N]: places in the flattened [B * T]
    ends: Tensor  # int32 [B + 1]: where each row begins and ends among them

    @classmethod
    def of(cls, shown: Tensor) -> _Packing:
        lengths = shown.sum(1, dtype=torch.int32)
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(shown.flatten().nonzero().flatten(), ends)


def _flash(visible: Visible, *, dropout: float, device: torch.device) -> Attend:
    kernel = _varlen_kernel(dropout)
    shown = visible.shown
    if isinstance(visible.start, Tensor):
        # In a buffer of fixed length the keys after the newest are not there yet.
        newest = visible.start + visible.queries
        held = torch.arange(visible.keys, device=device) < newest
        shown = held[None] if shown is None else shown.to(device) & held
    if shown is None:
        return partial(_flash_dense, kernel=kernel)
    return partial(_flash_packed, kernel=kernel, shown=shown.to(device), start=visible.start)


def _flash_dense(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: Callable[..., Any]
) -> tuple[Tensor, None]:
    B, _, T, _ = q.shape
    S = k.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H, D], [B * S, H, D]
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    out = kernel(q, k, v, starts * T, starts * S, T, S)
    return out.unflatten(0, (B, T)).transpose(1, 2), None  # [B, H, T, D]


def _flash_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: Callable[..., Any],
    shown: Tensor,
    start: int | Tensor,
) -> tuple[Tensor, None]:
    B, _, T, _ = q.shape
    S = k.shape[2]
    shown = shown.to(q.device).expand(B, S)
    places = torch.arange(T, device=q.device) + start
    asking, asked = _Packing.of(shown[:, places]), _Packing.of(shown)
    queries = q.transpose(1, 2).flatten(0, 1)  # [B * T, H, D]
    keys, values = (x.transpose(1, 2).flatten(0, 1)[asked.rows] for x in (k, v))  # [N, H, D]
    packed = kernel(queries[asking.rows], keys, values, asking.ends, asked.ends, T, S)
    out = torch.zeros_like(queries).index_copy(0, asking.rows, packed)
    return out.unflatten(0, (B, T)).transpose(1, 2), None  # [B, H, T, D]
