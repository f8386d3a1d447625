"""Two tensors compared: every flipped bit is found, and rounding is told from error."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import comparing
from conversion.comparing import Comparison, Result, checksum, compare, holds_only
from conversion.views import Constant, Transposed, rounded
from opt_core.checkpoint import Array, StoredTensor, saving
from tests.test_views import folder, stored

__all__ = ["folder"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(t) for t in (np.float16, np.float32, np.float64)] + [BFLOAT16]


class Held:
    """An array as a source of which parts can be read."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.shape = values.shape
        self.dtype = values.dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        window: list[Any] = [slice(None)] * self.values.ndim
        if part is not None:
            window[axis] = part
        return np.array(self.values[tuple(window)])

    def map(self) -> Array:
        return self.values


def compared(a: Any, b: Any) -> Comparison:
    return compare(Held(np.asarray(a)), Held(np.asarray(b)))


def normal(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    values: Array = np.random.default_rng(7).standard_normal(shape).astype(dtype)
    return values


@given(st.data())
def test_any_single_flipped_bit_is_found_where_it_is(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([*FLOATS, np.dtype(np.int64), np.dtype(np.uint8)]))
    shape = data.draw(st.sampled_from([(), (1,), (7,), (5, 3), (2, 3, 4)]))
    a = np.asarray(normal(shape, np.float64) * 50).astype(dtype)
    b = np.asarray(a).copy()
    size = a.nbytes
    bit = data.draw(st.integers(0, 8 * size - 1))
    b.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    with pytest.MonkeyPatch.context() as patch:
        size = data.draw(st.sampled_from([1, 24, 10**6]))
        patch.setattr(saving, "_BLOCK_BYTES", size)
        patch.setattr(StoredTensor, "block_bytes", size)
        patch.setattr(comparing, "_STEP", data.draw(st.sampled_from([1, 4, 10**6])))
        found, same = compared(a, b), compared(a, a)
    assert (found.result, found.count) == (Result.DIFFERENT, 1)
    place = np.unravel_index(bit // 8 // a.itemsize, shape)
    assert found.first == tuple(map(int, place))
    sums = tuple(hashlib.sha256(values.tobytes()).hexdigest() for values in (a, b))
    assert found.sha256 == sums
    assert same == Comparison(Result.IDENTICAL, (sums[0], sums[0]))


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_a_cast_is_equal_in_value_or_after_rounding(kind: np.dtype[Any], to: np.dtype[Any]) -> None:
    a = normal((40, 7)).astype(kind)
    b = rounded(a, to)
    found = compared(a, b)
    exact = np.array_equal(a.astype(np.float64), b.astype(np.float64))
    if kind == to:
        assert found.result is Result.IDENTICAL
    elif exact:
        assert (found.result, found.rounded_to, found.largest) == (Result.EQUAL, None, 0.0)
    else:
        assert (found.result, found.rounded_to) == (Result.ROUNDED, str(to))
        assert found.largest == np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        scale = max(float(np.abs(values.astype(np.float64)).max()) for values in (a, b))
        assert found.relative == found.largest / scale
    assert (found.count, found.first) == (0, None)
    back = compared(b, a)
    assert (back.result, back.rounded_to) == (found.result, found.rounded_to)
    assert back.sha256 == found.sha256[::-1]


def test_small_values_may_be_rounded_from_bfloat16_to_float16() -> None:
    a = np.array([1.1e-7, 3e-6, 0.5, 0.0]).astype(BFLOAT16)
    found = compared(a, a.astype(np.float16))
    assert (found.result, found.rounded_to) == (Result.ROUNDED, "float16")


def test_rounding_the_wrong_way_is_a_difference() -> None:
    a = normal((64,))
    cut = (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(BFLOAT16)
    found = compared(a, cut)
    nearest = a.astype(BFLOAT16)
    assert found.result is Result.DIFFERENT
    assert found.count == np.count_nonzero(cut != nearest) > 0
    assert found.first == (np.flatnonzero(cut != nearest)[0],)


def test_the_figures_of_a_difference_are_those_of_numpy() -> None:
    a = normal((100, 30))
    b = a + np.where(normal((100, 30)) > 1, np.float32(1e-3), np.float32(0)) * normal((100, 30))
    found = compared(a, b)
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    assert found.count == np.count_nonzero(a != b)
    assert found.first == tuple(np.argwhere(a != b)[0])
    assert found.largest == gap.max()
    assert found.relative == gap.max() / max(np.abs(a).max(), np.abs(b).max())


def test_a_difference_at_the_end_is_held_against_the_largest_value_at_the_start() -> None:
    a = np.ones(1000, np.float32)
    a[0] = -50
    b = a.copy()
    b[-1] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_BLOCK_BYTES", 400)
        patch.setattr(StoredTensor, "block_bytes", 400)
        assert compared(a, b).relative == 1 / 50


def single(values: list[float]) -> Array:
    return np.array(values, np.float32)


def half(values: list[float]) -> Array:
    return np.array(values, np.float16)


def nan(bits: int) -> Array:
    return np.array([bits], np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("a", "b", "largest", "note"),
    [
        (single([0.0]), single([-0.0]), 0.0, "1 zeros that differ in sign"),
        (single([np.nan]), single([1]), np.inf, "1 NaN against a number"),
        (single([1]), single([np.nan]), np.inf, "1 NaN against a number"),
        (nan(0x7FC00000), nan(0x7FC00001), 0.0, "1 NaN of other bits"),
        (single([np.inf]), single([-np.inf]), np.inf, None),
        (single([3e38]), single([np.inf]), np.inf, "1 finite against infinite"),
        (single([7e4]), half([np.inf]), np.inf, "1 finite against infinite"),
        (single([-0.0]), half([0.0]), 0.0, "1 zeros that differ in sign"),
        (single([np.nan]), half([1]), np.inf, "1 NaN against a number"),
    ],
)
def test_what_figures_do_not_say_is_noted(
    a: Array, b: Array, largest: float, note: str | None
) -> None:
    found = compared(a, b)
    assert (found.result, found.count, found.largest) == (Result.DIFFERENT, 1, largest)
    assert found.notes == (() if note is None else (note,))


def test_equal_nans_and_infinities_are_equal() -> None:
    a = single([np.nan, np.inf, -np.inf, 1.0])
    assert compared(a, a.copy()).result is Result.IDENTICAL
    for kind in (np.float16, np.float64, BFLOAT16):
        assert compared(a, a.astype(kind)).result is Result.EQUAL


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_tensors_without_values_are_identical(shape: tuple[int, ...]) -> None:
    empty = np.zeros(shape, np.float32)
    assert compared(empty, empty).result is Result.IDENTICAL
    assert compared(empty, empty.astype(np.float16)).result is Result.EQUAL


def test_a_turned_tensor_is_compared_in_the_canonical_order(folder: Any) -> None:
    a = normal((30, 20))
    turned = Transposed(stored(folder, np.ascontiguousarray(a.T)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_BLOCK_BYTES", 400)
        patch.setattr(StoredTensor, "block_bytes", 400)
        patch.setattr(Transposed, "block_bytes", 400)
        found = compare(Held(a), turned)
    assert (found.result, found.sha256[1]) == (
        Result.IDENTICAL,
        hashlib.sha256(a.tobytes()).hexdigest(),
    )


def test_no_more_than_a_block_of_each_is_read_at_once() -> None:
    asked: list[int] = []

    class Watched(Held):
        def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
            values = super().read(part, axis=axis)
            asked.append(values.nbytes)
            return values

    counted: list[int] = []
    a = Watched(normal((1000, 10)))
    b = Watched(a.values.astype(np.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_BLOCK_BYTES", 8000)
        patch.setattr(StoredTensor, "block_bytes", 8000)
        assert compare(a, b, counted.append).result is Result.EQUAL
    assert max(asked) == 8000
    assert sum(asked) == sum(counted) == 1000 * 10 * 12


def test_one_tensor_alone_has_a_checksum_and_may_be_constant() -> None:
    values = normal((9, 3))
    assert checksum(Held(values)) == hashlib.sha256(values.tobytes()).hexdigest()
    assert holds_only(Constant((9, 3), BFLOAT16, 1.0), 1.0)
    assert not holds_only(Constant((9, 3), BFLOAT16, 1.0), 0.0)
    values[:] = 0
    values[8, 2] = 1e-30
    assert not holds_only(Held(values), 0.0)
