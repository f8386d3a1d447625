"""Logits of two checkpoints beside the reference's, and whether they keep their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Logits, or why there are none.
Computed = NDArray[np.floating[Any]] | str


@dataclass(frozen=True)
class Logits:
    """One backend on two checkpoints: errors as shares of the largest logit of the reference's.

    None stands for what was not computed.
    """

    title: str
    #: The largest difference to the reference, on A and on B.
    a: float | None
    b: float | None
    #: The largest difference of A to B.
    between: float | None
    #: What is wrong, empty if nothing is.
    said: str

    @property
    def holds(self) -> bool:
        """Whether everything was computed and keeps its bound."""
        return not self.said

    @classmethod
    def of(
        cls,
        title: str,
        found: tuple[Computed, Computed],
        expected: tuple[Computed, Computed],
        bound: float | None,
        between_bound: float | None,
    ) -> Logits:
        """Errors of what was `found`, on A and on B; no bound is no demand."""
        faults = [
            f"{side} was not run: {scores}"
            for side, scores in zip("AB", found, strict=True)
            if isinstance(scores, str)
        ]
        a, b = (_error(scores, exact) for scores, exact in zip(found, expected, strict=True))
        between = _error(found[1], found[0])
        named = (("A", a, bound), ("B", b, bound), ("A to B", between, between_bound))
        faults += [
            f"{name}: {error:.1e} exceeds {limit:.0e}"
            for name, error, limit in named
            if error is not None and limit is not None and not error <= limit
        ]
        is_reference = found is expected
        return cls(
            title,
            None if is_reference else a,
            None if is_reference else b,
            between,
            "; ".join(faults),
        )


def _error(found: Computed, expected: Computed) -> float | None:
    if isinstance(found, str) or isinstance(expected, str) or found.shape != expected.shape:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.abs(found.astype(np.float64) - expected).max(initial=0)
        scale = np.abs(expected).max(initial=0)
        return float(gap / scale) if scale else float(gap)
