"""Tensors made of other tensors: each view gives what NumPy gives, in any part, in C order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion.losses import LOSSES, Losses, Watched
from conversion.views import Constant, Joined, Part, Transposed, transposed
from opt_core.checkpoint import (
    Array,
    StoredFile,
    StoredTensor,
    TensorSource,
    blocks,
    saving,
)

DTYPES = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def cast_to(source: TensorSource, dtype: Any) -> TensorSource:
    """The values in another type, as a conversion writes them."""
    return Watched("a tensor", source, np.dtype(dtype), Losses(LOSSES))


def stored(folder: Path, values: Array, *, name: str = "tensor") -> StoredTensor:
    """The values as a tensor that lies in a file, in the order of their memory."""
    strides = tuple(step // values.itemsize for step in values.strides)
    is_c = values.flags.c_contiguous
    (folder / name).write_bytes(b"head" + (values if is_c else values.T).tobytes())
    file = StoredFile.of(folder / name)
    return StoredTensor(file, 4, values.shape, values.dtype, None if is_c else strides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


@st.composite
def arrays(draw: st.DrawFn, *, dims: st.SearchStrategy[int]) -> Array:
    """Distinct values, so that one in a wrong place shows; sometimes in Fortran order."""
    shape = tuple(draw(st.integers(0, 5)) for _ in range(draw(dims)))
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return values.astype(draw(st.sampled_from(DTYPES)), order=draw(st.sampled_from("CF")))


@st.composite
def views(draw: st.DrawFn, folder: Path) -> tuple[TensorSource, Array]:
    """Up to three views over stored tensors, with what they must be."""
    values = draw(arrays(dims=st.integers(1, 2)))
    source: TensorSource = stored(folder, values)
    for _ in range(draw(st.integers(1, 3))):
        axis = draw(st.integers(0, values.ndim - 1))
        kind = draw(st.sampled_from(["turned", "part", "joined", "cast"]))
        if kind == "turned" and values.ndim == 2:
            source, values = transposed(source), values.T
        elif kind == "part":
            start = draw(st.integers(0, values.shape[axis]))
            stop = draw(st.integers(start, values.shape[axis]))
            source, values = Part(source, axis, start, stop), values.take(range(start, stop), axis)
        elif kind == "joined":
            count = draw(st.integers(1, 3))
            source, values = Joined((source,) * count, axis), np.concatenate([values] * count, axis)
        elif kind == "cast":
            dtype = draw(st.sampled_from(DTYPES))
            source, values = cast_to(source, dtype), values.astype(dtype)
    return source, values


def check(source: TensorSource, part: slice | None, axis: int, expected: Array) -> None:
    read = source.read(part, axis=axis)
    assert (read.shape, read.dtype) == (expected.shape, expected.dtype)
    assert read.flags.c_contiguous
    assert read.flags.writeable
    assert np.array_equal(read, expected)


@given(st.data())
def test_a_view_of_views_reads_as_numpy_does(folder: Path, data: st.DataObject) -> None:
    for _ in range(10):
        source, values = data.draw(views(folder))
        assert (source.shape, source.dtype) == (values.shape, values.dtype)
        check(source, None, 0, values)
        assert np.array_equal(source.map(), values)
        axis = data.draw(st.integers(0, values.ndim - 1))
        ends = st.integers(-7, 7) | st.none()
        part = slice(data.draw(ends), data.draw(ends))
        window: list[Any] = [slice(None)] * values.ndim
        window[axis] = part
        check(source, part, axis, values[tuple(window)])


@given(st.data())
def test_the_blocks_of_a_view_are_its_bytes_in_c_order(folder: Path, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_BLOCK_BYTES", 24)
        patch.setattr(StoredTensor, "block_bytes", 16)
        patch.setattr(Transposed, "block_bytes", 40)
        patch.setattr("conversion.views._COLUMNS", 2)
        for _ in range(10):
            source, values = data.draw(views(folder))
            assert b"".join(blocks(source)) == values.tobytes()


def test_no_block_is_larger_than_asked_for_unless_a_row_is(folder: Path) -> None:
    source = stored(folder, np.zeros((100, 3), np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensor, "block_bytes", 40)
        assert [len(block) for block in blocks(source)] == [36] * 33 + [12]
        patch.setattr(StoredTensor, "block_bytes", 5)
        assert {len(block) for block in blocks(source)} == {12}


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,)])
def test_tensors_with_few_values_have_their_bytes_too(folder: Path, shape: tuple[int, ...]) -> None:
    values = np.ones(shape, np.float32)
    assert b"".join(blocks(stored(folder, values))) == values.tobytes()
    assert b"".join(blocks(values)) == values.tobytes()


@pytest.mark.parametrize("view", ["turned", "part", "other axis", "joined", "cast", "constant"])
def test_a_part_with_a_step_is_refused_not_read_as_another(folder: Path, view: str) -> None:
    source = stored(folder, np.zeros((4, 4), np.float32))
    made: dict[str, TensorSource] = {
        "turned": Transposed(source),
        "part": Part(source, 0, 1, 3),
        "other axis": Part(source, 1, 1, 3),
        "joined": Joined((source, source), 0),
        "cast": cast_to(source, np.dtype(np.float16)),
        "constant": Constant((4, 4), source.dtype, 0.0),
    }
    with pytest.raises(ValueError, match="expected step 1, found 2"):
        made[view].read(slice(0, 4, 2))


def test_a_joined_tensor_of_turned_rows_is_in_c_order(folder: Path) -> None:
    rows = stored(folder, np.arange(4, dtype=np.float32).reshape(1, 4))
    joined = Joined((Transposed(rows),) * 3, 1)
    for part in (None, slice(1, 3)):
        check(
            joined, part, 0, np.repeat(np.arange(4, dtype=np.float32)[:, None], 3, 1)[part or ...]
        )


def test_turning_twice_is_the_tensor_itself(folder: Path) -> None:
    source = stored(folder, np.zeros((2, 3), np.float32))
    assert transposed(transposed(source)) is source


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_cast_to_its_own_type_keeps_every_bit(folder: Path, kind: Any) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 256, 4096, np.uint8)
    values = bits.view(kind)
    cast = cast_to(stored(folder, values), np.dtype(kind))
    assert cast.read().tobytes() == bits.tobytes()
    assert cast.map().tobytes() == bits.tobytes()


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-8 + 2**-40, 1 + 2**-7),  # just above the middle: once through float32 gives 1
        (1 + 2**-8 - 2**-40, 1.0),
        (1 + 2**-8, 1.0),  # the middle goes to the even one
        (1 + 3 * 2**-8, 1 + 2**-6),
        (-1 - 2**-8 - 2**-40, -1 - 2**-7),
        (2.0**-133 * (1 - 2**-40), 2.0**-133),  # the smallest subnormal
        (2.0**-134 * (1 + 2**-40), 2.0**-133),
        (2.0**-134, 0.0),
        (float("inf"), float("inf")),
        (1e300, float("inf")),
        (-0.0, -0.0),
    ],
)
def test_a_cast_rounds_once_to_the_nearest_value(
    folder: Path, value: float, rounded: float
) -> None:
    source = stored(folder, np.array([value]))
    for cast in (cast_to(source, BFLOAT16).read(), cast_to(source, BFLOAT16).map()):
        assert cast.dtype == BFLOAT16
        assert cast.astype(np.float64).tobytes() == np.array([rounded]).tobytes()


def test_a_cast_of_nan_is_nan(folder: Path) -> None:
    for dtype in DTYPES[:4]:
        assert np.isnan(cast_to(stored(folder, np.array([np.nan])), dtype).read()).all()


@given(st.floats(width=64, allow_nan=False), st.sampled_from([np.float32, np.float16]))
def test_a_cast_from_double_precision_is_that_of_numpy(value: float, kind: Any) -> None:
    with np.errstate(all="ignore"):
        expected = np.array([value]).astype(kind)
    constant = Constant((1,), np.dtype(np.float64), value)
    assert cast_to(constant, np.dtype(kind)).read().tobytes() == expected.tobytes()
