"""Two tensors compared value by value, with their checksums, in one pass of bounded memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.pieces import Count
from conversion.views import rounded
from opt_core.checkpoint import Array, TensorSource, blocks, parts, read_part

# Values looked at together: what is made of them in double precision fits the caches.
_STEP = 1 << 17


class Result(Enum):
    """What became of one tensor; the value is how it is called."""

    IDENTICAL = "identical"
    EQUAL = "equal values"
    ROUNDED = "equal after rounding"
    TIED = "copy of the embedding"
    NEUTRAL = "switched off"
    DIFFERENT = "different"
    SHAPES = "shapes differ"
    ONLY_A = "only in A"
    ONLY_B = "only in B"

    @property
    def is_difference(self) -> bool:
        """Whether a model would not be the same."""
        return self in (Result.DIFFERENT, Result.SHAPES, Result.ONLY_A, Result.ONLY_B)


@dataclass(frozen=True)
class Comparison:
    """Two tensors beside each other: A is the first, B the second."""

    result: Result
    #: Of the bytes in the canonical layout, C order and the stored type; None for no tensor.
    sha256: tuple[str | None, str | None]
    #: The type to which one was rounded, where that explains all differences.
    rounded_to: str | None = None
    #: The largest absolute difference; infinite for NaN or an infinity against a number.
    largest: float = 0.0
    #: That, as a share of the largest finite value of the two tensors.
    relative: float = 0.0
    #: How many values differ, after rounding where the types differ.
    count: int = 0
    #: Where the first of them is.
    first: tuple[int, ...] | None = None
    #: What the figures do not say, such as zeros that differ in sign.
    notes: tuple[str, ...] = ()


def compare(a: TensorSource, b: TensorSource, count: Count = lambda size: None) -> Comparison:
    """Compare two tensors of one shape.

    Of one type they are identical when every bit is. Of two types they are equal when every value
    is, or when all that differ are explained by rounding the one to the type of the other; a
    finite value that has become infinite is a difference.
    """
    run = _Run(a, b)
    for part in parts(a, b):
        count(run.add(read_part(a, part).reshape(-1), read_part(b, part).reshape(-1)))
    return run.concluded(a.shape)


def checksum(source: TensorSource, count: Count = lambda size: None) -> str:
    """The sha256 of a tensor's bytes in C order."""
    total = hashlib.sha256()
    for block in blocks(source):
        total.update(block)
        count(len(block))
    return total.hexdigest()


def holds_only(source: TensorSource, value: float) -> bool:
    """Whether every value of a tensor is this one."""
    return all(
        bool(np.all(np.frombuffer(block, source.dtype) == value)) for block in blocks(source)
    )


def _targets(a: np.dtype[Any], b: np.dtype[Any]) -> list[np.dtype[Any]]:
    """To which types the two may be rounded: to the one that the other holds, else to either."""
    if a == b or np.can_cast(a, b):
        return [a]
    return [b] if np.can_cast(b, a) else [b, a]


class _Run:
    """One comparison; it keeps nothing of the blocks that it is given."""

    def __init__(self, a: TensorSource, b: TensorSource) -> None:
        self._across = a.dtype != b.dtype
        self._tallies = [_Tally(kind, self._across) for kind in _targets(a.dtype, b.dtype)]
        self._sums = _Checksums()
        self._gap = _Gap()
        self._start = 0

    def add(self, left: Array, right: Array) -> int:
        """Compare the next values of both, in C order and flat; how many bytes that were."""
        same = not self._across and np.array_equal(_bits(left), _bits(right))
        self._sums.add(left, right, same)
        for i in range(0, left.size, _STEP):
            some, other = left[i : i + _STEP], right[i : i + _STEP]
            self._gap.scale = max(self._gap.scale, _largest(some))
            if not same:
                self._gap.add(some, other)
                for tally in self._tallies:
                    tally.add(some, other, self._start + i)
        self._start += left.size
        return left.nbytes + right.nbytes

    def concluded(self, shape: tuple[int, ...]) -> Comparison:
        """What all blocks together say of tensors of a shape."""
        tally = min(self._tallies, key=lambda one: one.count)
        sums, largest = self._sums.sha256, self._gap.largest
        relative = largest / (self._gap.scale or 1.0)
        if tally.count:
            at = tuple(int(i) for i in np.unravel_index(tally.first, shape))
            kept, notes = Result.DIFFERENT, tally.notes()
            return Comparison(kept, sums, None, largest, relative, tally.count, at, notes)
        if not self._across:
            return Comparison(Result.IDENTICAL, sums)
        if not largest:
            return Comparison(Result.EQUAL, sums)
        return Comparison(Result.ROUNDED, sums, str(tally.kind), largest, relative)


def _bits(values: Array) -> NDArray[np.unsignedinteger[Any]]:
    return values.view(np.dtype(f"u{values.itemsize}"))


def _largest(values: Array) -> float:
    """The largest finite magnitude: for floats read as integers, which is several times as fast."""
    if np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_:
        return float(np.max(np.abs(values.astype(np.float64)), initial=0))
    infinity = _bits(np.array([np.inf], values.dtype))
    sign = _bits(np.array([-0.0], values.dtype))
    magnitudes = _bits(values) & ~sign
    if magnitudes.size and magnitudes.max() >= infinity[0]:
        magnitudes[magnitudes >= infinity] = 0
    return float(np.max(magnitudes, initial=0).view(values.dtype))


class _Checksums:
    """Two checksums, of which the second is made only from where the tensors part."""

    def __init__(self) -> None:
        self._a = hashlib.sha256()
        self._b = self._a

    def add(self, left: Array, right: Array, same: bool) -> None:
        if not same and self._b is self._a:
            self._b = self._a.copy()
        self._a.update(_bytes(left))
        if self._b is not self._a:
            self._b.update(_bytes(right))

    @property
    def sha256(self) -> tuple[str, str]:
        return self._a.hexdigest(), self._b.hexdigest()


def _bytes(values: Array) -> memoryview:
    return values.view(np.uint8).data


class _Gap:
    """The largest difference of two tensors, and the largest value to hold it against."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.scale = 0.0

    def add(self, left: Array, right: Array) -> None:
        self.scale = max(self.scale, _largest(right))
        a, b = left.astype(np.float64), right.astype(np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.abs(a - b)
        unclear = ~np.isfinite(gap)
        if unclear.any():
            a, b = a[unclear], b[unclear]
            equal = (a == b) | (np.isnan(a) & np.isnan(b))
            gap[unclear] = np.where(equal, 0.0, np.inf)
        self.largest = max(self.largest, float(gap.max(initial=0)))


@dataclass
class _Tally:
    """The values that differ after both tensors have been rounded to one type."""

    kind: np.dtype[Any]
    #: Whether the tensors are of two types.
    across: bool
    count: int = 0
    first: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, left: Array, right: Array, start: int) -> None:
        a, b = rounded(left, self.kind), rounded(right, self.kind)
        differ = _bits(a) != _bits(b)
        if self.across:
            # What a NaN carries besides does not survive a change of type, and need not.
            differ &= ~(np.isnan(a) & np.isnan(b))
            differ |= np.isfinite(left) != np.isfinite(right)
        places = np.flatnonzero(differ)
        if not places.size:
            return
        if not self.count:
            self.first = start + int(places[0])
        self.count += places.size
        self._sort(left[places], right[places])

    def notes(self) -> tuple[str, ...]:
        """What is special about the values that differ."""
        return tuple(f"{count:,} {said}" for said, count in self.kinds.items() if count)

    def _sort(self, a: Array, b: Array) -> None:
        found = {
            "zeros that differ in sign": (a == 0) & (b == 0),
            "NaN against a number": np.isnan(a) != np.isnan(b),
            "NaN of other bits": np.isnan(a) & np.isnan(b),
            "finite against infinite": (
                (np.isfinite(a) != np.isfinite(b)) & ~np.isnan(a) & ~np.isnan(b)
            ),
        }
        for said, where in found.items():
            self.kinds[said] = self.kinds.get(said, 0) + int(np.count_nonzero(where))
