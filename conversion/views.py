"""Tensors made of other tensors, read only when asked for: turned, cut, joined, constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from opt_core.checkpoint import Array, TensorSource, block_bytes, parts, turned

_COLUMNS = 64


@dataclass(frozen=True)
class Transposed:
    """A matrix with its two axes exchanged: `[A, B]` in the file, `[B, A]` here."""

    source: TensorSource

    #: A block here is a stripe of columns there, which a file gives up row by row: wide stripes
    #: keep the runs of bytes long.
    block_bytes: ClassVar[int] = 128 * 1024 * 1024

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source, the other way round."""
        return self.source.shape[::-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the source."""
        return self.source.dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own."""
        return turned(self.source.read(part, axis=1 - axis))

    def blocks(self) -> Iterator[Array]:
        """Parts of the first axis: small ones, of wide stripes of the source."""
        for part in parts(self):
            stripe = self.source.read(part, axis=1)
            width = max(_COLUMNS, block_bytes(self.source) // max(1, stripe[:, :1].nbytes))
            for i in range(0, stripe.shape[1], width):
                yield turned(stripe[:, i : i + width])

    def map(self) -> Array:
        """The values as a view of the source's."""
        return self.source.map().T


def transposed(source: TensorSource) -> TensorSource:
    """The source with its two axes exchanged; turned twice it is itself."""
    return source.source if isinstance(source, Transposed) else Transposed(source)


@dataclass(frozen=True)
class Part:
    """The rows `start` to `stop` of a tensor's axis `axis`."""

    source: TensorSource
    axis: int
    start: int
    stop: int

    @property
    def block_bytes(self) -> int:
        """That of the source."""
        return block_bytes(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source, `stop - start` along the axis."""
        shape = list(self.source.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the source."""
        return self.source.dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own."""
        if part is None:
            return self.source.read(slice(self.start, self.stop), axis=self.axis)
        first, last = _ends(part, self.shape[axis])
        if axis == self.axis:
            return self.source.read(slice(self.start + first, self.start + last), axis=axis)
        return self._window(self.source.read(slice(first, last), axis=axis)).copy()

    def map(self) -> Array:
        """The values as a view of the source's."""
        return self._window(self.source.map())

    def _window(self, values: Array) -> Array:
        window = [slice(None)] * values.ndim
        window[self.axis] = slice(self.start, self.stop)
        return values[tuple(window)]


@dataclass(frozen=True)
class Joined:
    """Tensors one after another along `axis`; of one type and of one shape but for that axis."""

    sources: tuple[TensorSource, ...]
    axis: int

    @property
    def block_bytes(self) -> int:
        """The most that a part asks for."""
        return max(map(block_bytes, self.sources))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parts, their sum along the axis."""
        shape = list(self.sources[0].shape)
        shape[self.axis] = sum(source.shape[self.axis] for source in self.sources)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the parts."""
        return self.sources[0].dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own."""
        length = self.shape[axis]
        first, last = (0, length) if part is None else _ends(part, length)
        shape = list(self.shape)
        shape[axis] = last - first
        values = np.empty(shape, self.dtype)
        place = [slice(None)] * len(shape)
        if axis != self.axis:
            first, last = 0, self.shape[self.axis]
        ends = accumulate(source.shape[self.axis] for source in self.sources)
        for source, end in zip(self.sources, ends, strict=True):
            begin = end - source.shape[self.axis]
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                place[self.axis] = slice(start - first, stop - first)
                cut = slice(start - begin, stop - begin) if axis == self.axis else part
                values[tuple(place)] = source.read(cut, axis=axis)
        return values

    def map(self) -> Array:
        """The values, copied: they lie in several places."""
        return self.read()


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """Each value rounded once to the nearest of a type; too large ones become infinite.

    The values themselves where they are of that type.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if values.dtype == np.float64 and dtype == ml_dtypes.bfloat16:
            values = _rounded_to_odd(values)
        return values.astype(dtype, copy=False)


def _rounded_to_odd(values: Array) -> Array:
    """Double precision as single, so that rounding once more is as if only that had been done.

    The bfloat16 library goes through single precision as well, but to the nearest value, and so
    moves a value close to a middle onto it. Boldo and Melquiond, "When double rounding is odd".
    """
    single = values.astype(np.float32)
    exact = single.astype(np.float64)
    bits = single.view(np.uint32)
    bits -= np.abs(exact) > np.abs(values)
    bits |= exact != values
    return single


@dataclass(frozen=True)
class Constant:
    """A tensor of one value, for a format that must hold what a model does without."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    value: float

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis."""
        shape = list(self.shape)
        if part is not None:
            first, last = _ends(part, shape[axis])
            shape[axis] = last - first
        return np.full(shape, self.value, self.dtype)

    def map(self) -> Array:
        """The values."""
        return self.read()


def _ends(part: slice, length: int) -> tuple[int, int]:
    """Where a part of an axis begins and ends; ValueError unless it is contiguous."""
    start, stop, step = part.indices(length)
    if step != 1:
        raise ValueError(f"a part of a tensor is contiguous: expected step 1, found {step}")
    return start, max(start, stop)
