"""Tensors in files, and the safetensors and index files that hold them."""

import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from conversion import open_checkpoint
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsafe,
    StoredFile,
    StoredTensor,
    has_nan,
    read_index,
    read_safetensors,
    save,
)
from tests.fuzz.mutating import fuzz
from tests.fuzz.safetensors import target

Array = NDArray[Any]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
FLOATS = DTYPES[:4]


def weights(seed: int = 0, count: int = 5) -> dict[str, Array]:
    """Tensors of 4 KiB each, but for the first."""
    generator = np.random.default_rng(seed)
    names = ["model.decoder.embed_tokens.weight"]
    names += [f"model.decoder.layers.{i}.fc1.weight" for i in range(count)]
    return {
        name: generator.standard_normal((32 + 8 * (name == names[0]), 32), dtype=np.float32)
        for name in names
    }


def same_bits(found: Array, wanted: Array) -> bool:
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes()
    )


def assert_holds(folder: Path, wanted: Mapping[str, Array]) -> None:
    opened = open_checkpoint(folder)
    assert opened.tensors.keys() == wanted.keys()
    for name, tensor in opened.tensors.items():
        assert same_bits(tensor.read(), wanted[name]), name


def index_of(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A sharded checkpoint in `folder` whose index has been changed; the index."""
    save(folder, weights(), max_shard_size=9000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return path


# Reading


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_read_and_mapped_bit_for_bit(tmp_path: Path, dtype: type) -> None:
    values: Array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    save(tmp_path, {"model.decoder.x": values})
    tensor = read_safetensors(tmp_path / "model.safetensors")["model.decoder.x"]
    assert same_bits(tensor.read(), values)
    assert same_bits(tensor.map(), values)
    assert tensor.read().flags.owndata


@given(data=st.data())
def test_a_part_of_any_axis_equals_that_part_of_the_whole(
    data: st.DataObject, tmp_path: Path
) -> None:
    shape = data.draw(st.sampled_from([(7,), (300, 400), (5, 1, 3), (2, 30_000), (4, 0)]))
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path / "raw"
    path.write_bytes(b"1234" + values.tobytes())
    axes = data.draw(st.permutations(range(len(shape))))
    stored = values.transpose(axes)
    strides = tuple(step // 4 for step in stored.strides)
    tensor = StoredTensor(StoredFile.of(path), 4, stored.shape, values.dtype, strides)
    axis = data.draw(st.integers(0, len(shape) - 1))
    bounds = st.none() | st.integers(-9, 400)
    part = slice(data.draw(bounds), data.draw(bounds))
    wanted = stored[(slice(None),) * axis + (part,)]
    assert same_bits(tensor.read(part, axis=axis), wanted)
    assert same_bits(tensor.read(), stored)
    assert same_bits(tensor.map(), stored)


def test_a_part_is_read_without_reading_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(8_000_000))
    tensor = StoredTensor(StoredFile.of(path), 0, (4, 500_000), np.dtype(np.float32))
    counted: list[int] = []
    read_exactly = "opt_core.checkpoint.tensors._read_exactly"
    monkeypatch.setattr(read_exactly, lambda handle, at, values, path: counted.append(values.size))
    tensor.read(slice(1, 2))
    assert sum(counted) == 500_000
    counted.clear()
    tensor.read(slice(0, 125_000), axis=1)
    assert sum(counted) == 500_000


def test_a_part_with_a_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"x": np.zeros(8)})
    tensor = read_safetensors(tmp_path / "model.safetensors")["x"]
    with pytest.raises(ValueError, match="expected step 1, found 2"):
        tensor.read(slice(0, 8, 2))


def test_writing_to_a_mapped_array_changes_neither_the_file_nor_another_mapping(
    tmp_path: Path,
) -> None:
    save(tmp_path, weights())
    tensors = read_safetensors(tmp_path / "model.safetensors")
    first = {name: tensor.map() for name, tensor in tensors.items()}
    second = {name: tensor.map() for name, tensor in tensors.items()}
    for array in first.values():
        array[:] = 7
    assert all(same_bits(array, weights()[name]) for name, array in second.items())
    assert_holds(tmp_path, weights())
    assert all((array == 7).all() for array in first.values())


def test_all_tensors_of_one_pass_share_one_map_of_the_file(tmp_path: Path) -> None:
    save(tmp_path, weights())
    tensors = read_safetensors(tmp_path / "model.safetensors")
    arrays = [tensor.map() for tensor in tensors.values()]
    assert len({id(array.base) for array in arrays}) == 1


def test_a_tensor_may_be_sent_to_another_process(tmp_path: Path) -> None:
    save(tmp_path, weights())
    tensors = read_safetensors(tmp_path / "model.safetensors")
    sent = pickle.loads(pickle.dumps(tensors))
    assert sent == tensors
    assert all(same_bits(sent[name].map(), weights()[name]) for name in sent)


def test_values_at_an_address_their_type_cannot_have_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"1" + np.arange(4, dtype=np.float32).tobytes())
    tensor = StoredTensor(StoredFile.of(path), 1, (4,), np.dtype(np.float32))
    assert tensor.map().tolist() == [0, 1, 2, 3]
    assert tensor.map().flags.aligned


def test_a_file_that_has_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"x": np.zeros(8)})
    tensor = read_safetensors(tmp_path / "model.safetensors")["x"]
    save(tmp_path, {"x": np.zeros(9)})
    for get in (tensor.read, tensor.map):
        with pytest.raises(CheckpointDamaged, match=r"model\.safetensors has changed since"):
            get()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match="is gone now"):
        tensor.read()


def test_a_file_that_ends_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(64))
    tensor = StoredTensor(StoredFile.of(path), 0, (8,), np.dtype(np.float64))
    path.write_bytes(bytes(40))
    monkeypatch.setattr(StoredFile, "check", lambda self, handle: None)
    with pytest.raises(CheckpointDamaged, match="raw ended 24 bytes before the end of a tensor"):
        tensor.read()


def test_a_tensor_beyond_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(10))
    with pytest.raises(CheckpointDamaged, match=r"raw is cut short.*bytes 4 to 12 of a file of 10"):
        StoredTensor(StoredFile.of(tmp_path / "raw"), 4, (2,), np.dtype(np.float32))


# Safetensors and index files


def header(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "x.safetensors of 0 bytes is cut short"),
        (struct.pack("<Q", 1 << 60) + b"{}", "x.safetensors of 10 bytes is cut short"),
        (header(b"{"), "invalid JSON"),
        (header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}), "damaged"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "not fully"),
        (
            header({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
            "tensor 'a' has type C64, expected one of BOOL",
        ),
        (
            header(
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 1 + b'"a":'
                b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
            )
            + b"0",
            "its header names 'a' twice",
        ),
    ],
)
def test_a_damaged_safetensors_file_is_named_with_its_fault(
    tmp_path: Path, data: bytes, fault: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=re.escape(fault)) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"there is no file .*gone\.safetensors"):
        read_safetensors(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/b", "a\\b", "..", "", "C:x", "a\0b"]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    path = index_of(tmp_path, lambda index: index["weight_map"].update(a=shard))
    with pytest.raises(CheckpointUnsafe, match="a shard is a file in the checkpoint's own folder"):
        read_index(path, read_safetensors)


@pytest.mark.parametrize("shard", ["model-00009-of-00009.safetensors", "x" * 5000])
def test_a_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    path = index_of(tmp_path, lambda index: index["weight_map"].update(a=shard))
    with pytest.raises(CheckpointNotFound, match=f"lacks the shard {shard[:40]}"):
        read_index(path, read_safetensors)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    shard = "model-00001-of-00004.safetensors"
    path = index_of(tmp_path, lambda index: index["weight_map"].update(a=shard))
    with pytest.raises(CheckpointDamaged, match=rf"'a' should be in the shard {shard}, which lack"):
        read_index(path, read_safetensors)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    name = "model.decoder.embed_tokens.weight"
    path = index_of(tmp_path, lambda index: index["weight_map"].update(a="extra.safetensors"))
    save_file({"a": np.zeros(1), name: np.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointDamaged, match=f"'{name}' should be in .*but is in extra"):
        read_index(path, read_safetensors)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "the shard of tensor 'a' is no file name"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "it names 'a' twice"),
        ("[]", "it holds no JSON object but a list"),
        ("[" * 100_000, "it is no valid JSON"),
        ("\udcff", "it is no valid JSON"),
    ],
)
def test_a_damaged_index_is_named_with_its_fault(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointDamaged, match=re.escape(f"{path}")) as caught:
        read_index(path, read_safetensors)
    assert fault in str(caught.value)


def test_shards_that_are_links_to_files_elsewhere_are_read(tmp_path: Path) -> None:
    save(tmp_path / "blobs", weights(), max_shard_size=9000)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_holds(tmp_path / "snapshot", weights())


# NaN


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_nan_of_either_sign_is_found_anywhere(dtype: type, sign: int) -> None:
    values: Array = np.full((301, 302), -np.inf, dtype)
    values[::2] = np.inf
    assert not has_nan(values)
    assert not has_nan(values.T)
    for place in ((0, 0), (150, 7), (300, 301)):
        values[place] = np.copysign(np.nan, sign)
        assert has_nan(values)
        assert has_nan(values.T)
        values[place] = 0


def test_integers_and_empty_arrays_have_no_nan() -> None:
    assert not has_nan(np.full(3, -1))
    assert not has_nan(np.zeros((0, 4), np.float32))
    assert has_nan(np.array(np.nan))


def test_mutated_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=500, seed=2)
    assert report.failures == []
    assert report.outcomes["read"] > 20
    assert report.outcomes["CheckpointDamaged"] > 100
