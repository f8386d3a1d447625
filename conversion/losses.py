"""What a conversion may lose: seen as values pass through, and stopped unless allowed by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conversion.views import Transposed, rounded
from opt_core.checkpoint import (
    Array,
    CheckpointError,
    TensorSource,
    arrays,
    block_bytes,
    is_finite,
)

#: The losses that can be allowed, and what each is.
LOSSES = {
    "missing": "tensors that the configuration asks for and the source lacks",
    "unknown": "tensors of the source that the configuration does not have: left out",
    "tied-head": "an lm_head that differs from the embedding it is tied to: left out",
    "not-finite": "NaN or infinite values in the source: copied as they are",
    "overflow": "values too large for the new type, which become infinite",
}


class LossyConversion(CheckpointError):
    """A conversion would lose something that was not allowed by name."""


@dataclass
class Losses:
    """The losses that are allowed, and those that have been found: loss to tensor to count."""

    allowed: Collection[str] = ()
    found: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what is no name of a loss."""
        unknown = sorted(set(self.allowed) - LOSSES.keys())
        if unknown:
            raise ValueError(
                f"there is no loss {', '.join(unknown)} to allow; known are {', '.join(LOSSES)}"
            )

    def note(self, loss: str, tensor: str, count: int, said: str) -> None:
        """Enter a loss; raises LossyConversion, with what is `said` of it, unless it is allowed."""
        if loss not in self.allowed:
            raise LossyConversion(
                f"{said}; --allow {loss} (allow=[{loss!r}]) converts all the same: {LOSSES[loss]}"
            )
        self.found.setdefault(loss, Counter())[tensor] += count


def watched(name: str, source: TensorSource, dtype: np.dtype[Any], losses: Losses) -> TensorSource:
    """A tensor whose values are looked at as they come from the file, before they are turned."""
    if isinstance(source, Transposed):
        return Transposed(Watched(name, source.source, dtype, losses))
    return Watched(name, source, dtype, losses)


@dataclass(frozen=True)
class Watched:
    """A tensor whose values are looked at as they are read, and cast if another type is wanted."""

    name: str
    source: TensorSource
    dtype: np.dtype[Any]
    losses: Losses

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def block_bytes(self) -> int:
        """That of the source."""
        return block_bytes(self.source)

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis.

        Raises LossyConversion when values are not finite, or would not be after the cast.
        """
        return self._passed(self.source.read(part, axis=axis))

    def blocks(self) -> Iterator[Array]:
        """The values of the source's blocks; see `read`."""
        return map(self._passed, arrays(self.source))

    def map(self) -> Array:
        """The values; see `read`."""
        return self._passed(self.source.map())

    # To look at a signalling NaN would warn.
    @np.errstate(invalid="ignore")
    def _passed(self, values: Array) -> Array:
        finite = is_finite(values)
        if not finite:
            count = int(values.size - np.count_nonzero(np.isfinite(values)))
            said = f"tensor {self.name!r} holds {count} values that are NaN or infinite"
            self.losses.note("not-finite", self.name, count, said)
        if values.dtype == self.dtype:
            return values
        cast = rounded(values, self.dtype)
        if not is_finite(cast):
            lost = int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(cast)))
            largest = float(np.max(np.abs(values[np.isfinite(values)]), initial=0))
            said = (
                f"{lost} values of tensor {self.name!r} are too large for {self.dtype}: "
                f"the largest is {largest:.4g}"
            )
            if lost:
                self.losses.note("overflow", self.name, lost, said)
        return cast
