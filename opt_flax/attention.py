"""How queries meet keys: what they may see, the kernels, and the choice of kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

#: XLA fuses the plain path by itself, so "eager" and "xla" are one program; the others are kernels
#: written by hand, for GPUs (cuDNN's flash attention) and for TPUs (the one that JAX ships).
IMPLEMENTATIONS = ("eager", "xla", "cudnn", "tpu_flash")

#: `[B, H, T, D]`, then `[B, H, S, D]` twice, and a key for dropout or None -> `[B, H, T, D]` and
#: the weights `[B, H, T, keys]` or None. Queries arrive scaled. See `Kernel`.
Attend = Callable[[Array, Array, Array, Array | None], tuple[Array, Array | None]]

#: Rows and columns that the TPU kernel works on at once.
_TILE = 128


class Visible(NamedTuple):
    """Which of the first `keys` keys the T queries that start at place `start` may attend to.

    `shown` is bool `[B, keys]`, or None where nothing is padded. `start` is an array where the
    keys lie in a buffer of fixed length; what lies behind the newest token there is not read.
    `allowed`, bool `[B, 1, T, keys]`, says in place of the order which keys each query sees.
    """

    start: int | Array
    queries: int
    keys: int
    shown: Array | None
    allowed: Array | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the keys are those of the queries, from the first token on."""
        return isinstance(self.start, int) and self.start == 0 and self.queries == self.keys

    def mask(self) -> Array:
        """Bool `[1 or B, 1, T, keys]`, True where a query may attend."""
        if self.allowed is not None:
            return self.allowed
        places = jnp.arange(self.queries, dtype=jnp.int32) + jnp.int32(self.start)
        seen = jnp.arange(self.keys, dtype=jnp.int32)[None] <= places[:, None]  # [T, S]
        mask: Array = seen[None, None]
        if self.shown is not None:
            mask = mask & self.shown.astype(bool)[:, None, None, :]  # [B, 1, T, S]
        return mask

    def held(self) -> Array | None:
        """Bool `[keys]`, True where a buffer is filled; None where it is full."""
        if isinstance(self.start, int):
            return None
        return jnp.arange(self.keys, dtype=jnp.int32) < self.start + self.queries


def choose(
    implementation: str,
    visible: Visible,
    *,
    dropout: float,
    weights: bool,
    dtype: Any,
    platform: str,
) -> Attend:
    """The kernel of one call, shared by its layers.

    `dropout` is the rate where a key is given. `platform` is "cpu", "gpu" or "tpu". Calls that the
    TPU kernel was not written for, those that continue a cache, run the plain path.

    Raises:
        ValueError: a kernel was chosen that cannot run this call.
    """
    mask, held, keys = visible.mask(), visible.held(), visible.keys
    if implementation in ("cudnn", "tpu_flash"):
        _refuse(implementation, dtype, platform, weights, dropout)
        blind = None if visible.shown is None else ~mask.any(-1, keepdims=True)
        if implementation == "cudnn":
            causal = visible.is_whole and visible.shown is None
            told = {"mask": None if causal else mask, "blind": blind, "held": held}
            return Kernel("cudnn", told, (("keys", keys), ("causal", causal)))
        if visible.is_whole:
            return Kernel("tpu_flash", {"shown": visible.shown, "blind": blind}, ())
    lowest = jnp.finfo(wide(dtype)).min
    # Two depths: a query that sees nothing attends evenly to the tokens that are there, and never
    # to the places of a buffer that nobody has filled.
    floor = lowest if held is None else jnp.where(held, lowest, -jnp.inf)[None, None, None]
    told = {"mask": mask, "floor": jnp.asarray(floor, wide(dtype))}
    return Kernel("eager", told, (("keys", keys), ("dropout", dropout), ("weights", weights)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kernel:
    """A kernel by its name, with the arrays and the options that it is told besides q, k and v.

    A tree of nothing but arrays and plain values: Flax transforms it, and shows it in a table.
    """

    name: str = field(metadata={"static": True})
    arrays: dict[str, Array | None]
    options: tuple[tuple[str, Any], ...] = field(metadata={"static": True})

    def __call__(
        self, q: Array, k: Array, v: Array, key: Array | None
    ) -> tuple[Array, Array | None]:
        """As `Attend`."""
        return _KERNELS[self.name](q, k, v, key, **self.arrays, **dict(self.options))


def eager(
    q: Array,
    k: Array,
    v: Array,
    key: Array | None,
    *,
    mask: Array,
    floor: Array,
    keys: int,
    dropout: float,
    weights: bool,
) -> tuple[Array, Array | None]:
    """The plain path. A forbidden score becomes `floor`: a query that sees nothing is even.

    Keys and values may be `[B * H, S, D]`: see `opt_flax.generation`.
    """
    k, v = k[..., :keys, :], v[..., :keys, :]
    kind, rows = wide(q.dtype), k.shape[:-2]
    asking = q.reshape(*rows, *q.shape[-2:])
    scores = jnp.einsum("...td,...sd->...ts", asking, k, preferred_element_type=kind)
    scores = scores.reshape(*q.shape[:3], keys)  # [B, H, T, S]
    chances = jax.nn.softmax(jnp.where(mask, scores, floor), axis=-1).astype(v.dtype)
    kept = chances if key is None else _dropped(chances, key, dropout)
    kept = kept.reshape(*rows, *kept.shape[-2:])
    out = jnp.einsum("...ts,...sd->...td", kept, v, preferred_element_type=kind).astype(v.dtype)
    return out.reshape(q.shape), chances if weights else None  # [B, H, T, D]


def cudnn(
    q: Array,
    k: Array,
    v: Array,
    key: Array | None,
    *,
    mask: Array | None,
    blind: Array | None,
    held: Array | None,
    keys: int,
    causal: bool,
) -> tuple[Array, None]:
    """The flash attention of cuDNN; `blind` queries `[B, 1, T, 1]` attend evenly."""
    k, v = k[:, :, :keys], v[:, :, :keys]
    rows, keyed, valued = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, T, H, D]
    out = jax.nn.dot_product_attention(
        rows, keyed, valued, mask=mask, scale=1.0, is_causal=causal, implementation="cudnn"
    )
    return _evened(out.swapaxes(1, 2), v, blind, held), None  # [B, H, T, D]


def tpu_flash(
    q: Array,
    k: Array,
    v: Array,
    key: Array | None,
    *,
    shown: Array | None,
    blind: Array | None,
) -> tuple[Array, None]:
    """The flash attention that JAX ships for TPUs, over whole texts."""
    # Late: importing Pallas takes longer than the rest of this package.
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    B, _, T, _ = q.shape
    k, v = k[:, :, :T], v[:, :, :T]
    rest = -T % _TILE
    q, longer_k, longer_v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, rest), (0, 0))) for x in (q, k, v)
    )  # [B, H, T + rest, D]
    segments = None
    if shown is not None:
        real = jnp.pad(shown.astype(jnp.int32), ((0, 0), (0, rest)))
        segments = SegmentIds(jnp.ones((B, T + rest), jnp.int32), real)
    out = flash_attention(q, longer_k, longer_v, segment_ids=segments, causal=True)
    return _evened(out[:, :, :T], v, blind, None), None  # [B, H, T, D]


_KERNELS: dict[str, Callable[..., tuple[Array, Array | None]]] = {
    "eager": eager,
    "cudnn": cudnn,
    "tpu_flash": tpu_flash,
}


def _evened(out: Array, v: Array, blind: Array | None, held: Array | None) -> Array:
    """Give queries that see nothing the mean of the values; a loss may read them."""
    if blind is None:
        return out
    there = None if held is None else held[None, None, :, None]
    mean = jnp.mean(v, axis=2, keepdims=True, where=there, dtype=wide(v.dtype))
    return jnp.where(blind, mean.astype(out.dtype), out)


def _dropped(weights: Array, key: Array, rate: float) -> Array:
    if rate >= 1.0:
        return jnp.zeros_like(weights)
    kept = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
    return jnp.where(kept, weights / jnp.asarray(1.0 - rate, weights.dtype), 0.0)


def wide(dtype: Any) -> Any:
    """The type in which scores and sums are held: float32, or float64 for float64."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def _refuse(implementation: str, dtype: Any, platform: str, weights: bool, dropout: float) -> None:
    if weights:
        raise ValueError(
            f"{implementation} never holds the attention weights, so output_attentions cannot be "
            'honoured; load the model with attn_implementation="eager" or "xla"'
        )
    if dropout:
        raise ValueError(
            f"{implementation} has no attention dropout; set attention_dropout to 0, or use "
            'attn_implementation="xla"'
        )
    name = jnp.dtype(dtype).name
    if implementation == "cudnn" and (platform != "gpu" or name not in ("float16", "bfloat16")):
        raise ValueError(
            f"cudnn needs float16 or bfloat16 on a CUDA device, found {name} on {platform}; "
            'convert the model, or use attn_implementation="xla"'
        )
    if implementation == "tpu_flash" and (platform != "tpu" or name == "float64"):
        raise ValueError(
            f"tpu_flash needs a TPU and at most float32, found {name} on {platform}; "
            'use attn_implementation="xla"'
        )
