"""Files in PyTorch's layout, written without torch: torch reads every bit of them, and so do we."""

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from conversion import format_named, open_checkpoint, read_torch_file
from conversion.torch_file import write_torch_file
from conversion.torch_file.values import STORAGE_DTYPES
from conversion.views import Constant
from opt_core.checkpoint import TensorSource
from opt_core.weights import Head
from tests.cases import HEADS, SWITCHES, random_weights, tiny
from tests.test_weights_table import Held

TYPES = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]


def held(arrays: dict[str, NDArray[Any]]) -> dict[str, TensorSource]:
    """Arrays as tensors that give up one part at a time."""
    return {name: Held(values) for name, values in arrays.items()}


def nothing(size: int) -> None:
    """Counts no bytes."""


def assert_torch_reads(path: Path, wanted: dict[str, NDArray[Any]], **options: Any) -> None:
    torch = pytest.importorskip("torch")
    for found in (
        torch.load(path, weights_only=True, **options),
        torch.load(path, weights_only=True, mmap=True, **options),
        torch.load(path, weights_only=False, **options),
    ):
        assert list(found) == list(wanted)
        for name, values in wanted.items():
            assert str(found[name].dtype) == f"torch.{values.dtype.name}"
            assert tuple(found[name].shape) == values.shape
            assert found[name].is_contiguous()
            bits = found[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert bits == values.tobytes()
    plain = torch.load(path, weights_only=True, mmap=True, **options)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in plain.values() if tensor.numel())


def assert_we_read(path: Path, wanted: dict[str, NDArray[Any]]) -> None:
    found = read_torch_file(path)
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        assert (found[name].shape, found[name].dtype) == (values.shape, values.dtype)
        assert found[name].read().tobytes() == values.tobytes()
        assert found[name].offset % 64 == 0


@pytest.mark.parametrize("dtype", STORAGE_DTYPES.values(), ids=str)
def test_every_type_and_shape_is_what_torch_reads(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    values = {
        "matrix": np.arange(12).reshape(3, 4).astype(dtype),
        "größe": np.arange(3).astype(dtype),
        "scalar": np.array(1).astype(dtype),
        "empty": np.zeros((0, 5), dtype),
        "cube": np.ones((2, 1, 300), dtype),
    }
    written: list[int] = []
    write_torch_file(tmp_path / "x.bin", held(values), written.append)
    assert sum(written) == sum(array.nbytes for array in values.values())
    assert_we_read(tmp_path / "x.bin", values)
    assert_torch_reads(tmp_path / "x.bin", values)


def test_a_type_that_torch_has_no_storage_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tensors of type uint16; known are float64, float32"):
        write_torch_file(tmp_path / "x.bin", held({"x": np.zeros(1, np.uint16)}), nothing)
    assert not (tmp_path / "x.bin").exists()


def test_no_file_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("kept")
    with pytest.raises(FileExistsError):
        write_torch_file(tmp_path / "x.bin", {}, nothing)
    assert (tmp_path / "x.bin").read_text() == "kept"


def test_a_state_dict_may_lie_within_another_dict(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_torch_file(
        tmp_path / "x.pt", held({"a": np.ones(2), "b": np.ones(3)}), nothing, within="model"
    )
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(found) == ["model"]
    assert {name: len(tensor) for name, tensor in found["model"].items()} == {"a": 2, "b": 3}


def test_equal_tensors_make_equal_files_whose_sums_are_right(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        write_torch_file(tmp_path / name, held({"x": np.arange(9.0)}), nothing)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == sys.byteorder.encode()


def test_sizes_and_places_beyond_four_gigabytes_are_written_as_torch_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"large": np.arange(300.0), "small": np.arange(3.0), "last": np.arange(200.0)}
    # Every size and place beyond this takes 64 bits.
    monkeypatch.setattr("conversion.zip_writing._LARGEST", 1000)
    write_torch_file(tmp_path / "x.bin", held(values), nothing)
    monkeypatch.undo()
    assert b"PK\x06\x06" in (tmp_path / "x.bin").read_bytes()
    assert_we_read(tmp_path / "x.bin", values)
    assert_torch_reads(tmp_path / "x.bin", values)


def test_numbers_beyond_two_to_the_31_are_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.torch_file.writing.blocks", lambda tensor: [])
    shape = (3 << 30, 5)
    tensors = {"x": Constant(shape, np.dtype(np.float32), 1.0)}
    write_torch_file(tmp_path / "x.bin", tensors, nothing)
    from conversion.torch_file.pickles import Pickles
    from conversion.torch_file.values import NAMES, Storages

    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        data = archive.read("archive/data.pkl")
    found = Pickles(tmp_path, io.BytesIO(data), len(data)).load(NAMES, Storages().refer)
    assert isinstance(found, dict)
    assert (found["x"].shape, found["x"].storage.size) == (shape, 4 * 5 * (3 << 30))


def test_a_large_tensor_passes_in_small_blocks(tmp_path: Path) -> None:
    sizes: list[int] = []
    tensors = {"x": Constant((20_000, 1000), np.dtype(np.float32), 1.0)}
    write_torch_file(tmp_path / "x.bin", tensors, sizes.append)
    assert sum(sizes) == 80_000_000
    assert max(sizes) <= 33_554_432


@given(
    data=st.data(),
    switch=st.sampled_from(sorted(SWITCHES)),
    head=st.sampled_from(HEADS),
    dtype=st.sampled_from(TYPES),
    limit=st.sampled_from([1, 5_000, 1 << 40]),
)
def test_a_written_checkpoint_reads_back_bit_for_bit(
    data: st.DataObject,
    switch: str,
    head: Head,
    dtype: np.dtype[Any],
    limit: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    config, row = tiny(**SWITCHES[switch]), format_named("pytorch")
    seed = data.draw(st.integers(0, 99))
    weights = {k: v.astype(dtype) for k, v in random_weights(config, head, seed).items()}
    stored = row.rule.stored(held(weights), config, head)
    for piece in row.pieces(stored, limit, config, head):
        piece.make(folder / piece.name, nothing)
    is_sharded = limit < sum(values.nbytes for values in weights.values())
    assert (folder / "pytorch_model.bin.index.json").exists() == is_sharded
    opened = open_checkpoint(folder)
    assert opened.format == "pytorch"
    assert opened.tensors.keys() == weights.keys()
    for name, tensor in opened.tensors.items():
        assert (tensor.shape, tensor.dtype) == (weights[name].shape, dtype)
        assert tensor.read().tobytes() == weights[name].tobytes()
