"""Tensors made of other tensors, read only when asked for: turned, cast, cut, joined, constant."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from opt_core.checkpoint import Array, TensorSource

_ROWS = 64


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
        values = self.source.read(part, axis=1 - axis)
        turned = np.empty(values.shape[::-1], values.dtype)
        # A few rows at a time stay in the cache until their columns are written: several times as
        # fast as NumPy's own copy, which misses the cache at each value.
        for i in range(0, len(values), _ROWS):
            turned[:, i : i + _ROWS] = values[i : i + _ROWS].T
        return turned

    def map(self) -> Array:
        """The values as a view of the source's."""
        return self.source.map().T


def transposed(source: TensorSource) -> TensorSource:
    """The source with its axes exchanged; turned twice it is itself."""
    return source.source if isinstance(source, Transposed) else Transposed(source)


@dataclass(frozen=True)
class Part:
    """The rows `start` to `stop` of a tensor's axis `axis`."""

    source: TensorSource
    axis: int
    start: int
    stop: int

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
        first, last, _ = part.indices(self.shape[axis])
        last = max(first, last)
        if axis == self.axis:
            return self.source.read(slice(self.start + first, self.start + last), axis=axis)
        whole = self.source.read(slice(first, last), axis=axis)
        return np.ascontiguousarray(np.take(whole, range(self.start, self.stop), self.axis))

    def map(self) -> Array:
        """The values as a view of the source's."""
        window = [slice(None)] * len(self.source.shape)
        window[self.axis] = slice(self.start, self.stop)
        return self.source.map()[tuple(window)]


@dataclass(frozen=True)
class Joined:
    """Tensors one after another along `axis`; of one type and of one shape but for that axis."""

    sources: tuple[TensorSource, ...]
    axis: int

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
        if part is None:
            return np.concatenate([source.read() for source in self.sources], self.axis)
        if axis != self.axis:
            cut = [source.read(part, axis=axis) for source in self.sources]
            return np.concatenate(cut, self.axis)
        first, last, _ = part.indices(self.shape[axis])
        ends = list(accumulate(source.shape[axis] for source in self.sources))
        pieces: list[Array] = []
        for source, end in zip(self.sources, ends, strict=True):
            begin = end - source.shape[axis]
            window = slice(max(first, begin) - begin, max(0, min(last, end) - begin))
            if window.start < window.stop or not pieces:
                pieces.append(source.read(window, axis=axis))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)

    def map(self) -> Array:
        """The values, copied: they lie in several places."""
        return self.read()


@dataclass(frozen=True)
class Cast:
    """A tensor with each value rounded to the nearest of another floating type."""

    source: TensorSource
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.source.read(part, axis=axis).astype(self.dtype, copy=False)

    def map(self) -> Array:
        """The values, copied unless the type is that of the source."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.source.map().astype(self.dtype, copy=False)


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
            shape[axis] = len(range(*part.indices(shape[axis])))
        return np.full(shape, self.value, self.dtype)

    def map(self) -> Array:
        """The values."""
        return self.read()
