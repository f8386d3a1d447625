"""How far results may lie apart: every bound that tests use, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np


class Bound(NamedTuple):
    """The largest error allowed, as a part of the largest value expected."""

    size: float
    reason: str


BOUNDS: Mapping[str, Bound] = {
    "float32": Bound(1e-5, "two float32 orders of summation, weights of the size of init_std"),
    "float32 files": Bound(2e-5, "as float32, but what is expected was itself made in float32"),
    "half": Bound(2e-2, "float16 and bfloat16 keep 8 to 11 bits, and a few layers add up"),
    "float64": Bound(1e-12, "two float64 orders of summation"),
    "same program": Bound(1e-6, "float32 kernels that split the same sums in another way"),
    "gradient": Bound(1e-4, "a backward pass sums over all tokens, in float32"),
    "vanishing gradient": Bound(1e-6, "probabilities less targets sum to 0: rounding of 1 is left"),
}

#: For weights larger than init_std: the error may be this often that of transformers in float32.
TIMES_TRANSFORMERS = 3.0
#: A gradient below this part of the model's largest is rounding alone: `k_proj.bias` has none.
NEGLIGIBLE_GRADIENT = 1e-3


def error(found: Any, expected: Any) -> float:
    """The largest difference as a part of the largest expected value; NaN must meet NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"found {found.shape}, expected {expected.shape}"
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    if not found.size or np.isnan(expected).all():
        return 0.0
    largest = max(float(np.nanmax(np.abs(expected))), 1e-9)
    return float(np.nanmax(np.abs(found - expected))) / largest


def assert_near(
    found: Any, expected: Any, bound: str = "float32", *, where: Any = ..., what: str = ""
) -> None:
    """Compare two arrays, or the parts of them that `where` selects, by a bound of the table."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: found {found.shape}, expected {expected.shape}"
    wrong = error(found[where], expected[where])
    size, reason = BOUNDS[bound]
    assert wrong <= size, f"{what} is off by {wrong:.1e}, more than {size:.0e} ({reason})"


def assert_gradients_near(
    found: Mapping[str, Any], expected: Mapping[str, Any], vanishing: Collection[str] = ()
) -> None:
    """Compare gradients by name, each by its own size unless that is negligible in the model.

    Those named in `vanishing` are sums whose terms cancel, so rounding does not shrink with the
    other gradients.
    """
    assert found.keys() == expected.keys()
    floor = NEGLIGIBLE_GRADIENT * max(float(np.abs(g).max()) for g in expected.values())
    for name, gradient in expected.items():
        size, reason = BOUNDS["gradient"]
        wrong = float(np.abs(np.asarray(found[name], np.float64) - gradient).max())
        allowed = size * max(float(np.abs(gradient).max()), floor)
        if name in vanishing and allowed < BOUNDS["vanishing gradient"].size:
            allowed, reason = BOUNDS["vanishing gradient"]
        assert wrong <= allowed, f"{name} is off by {wrong:.1e}, more than {allowed:.1e} ({reason})"
