"""Folders with one NumPy file a tensor: ours and those of others, damaged and unsafe ones."""

import io
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from conversion import open_checkpoint
from conversion.numpy_folder import numpy_pieces, read_numpy_file, read_numpy_folder
from conversion.views import Constant
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import configs, tiny
from tests.fuzz.mutating import fuzz
from tests.fuzz.numpy import target
from tests.written import assert_holds, assert_reads_by_part, dtypes, heads, weights_of, write

NAME = "model.decoder.layers.0.fc1.weight"


@given(config=configs(), head=heads, dtype=dtypes)
def test_what_is_written_is_read_back_bit_by_bit(
    config: OPTConfig, head: Head, dtype: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("written")
    weights = weights_of(config, head, dtype)
    counted = write(folder, "numpy", weights, config, head)
    assert counted == sum(values.nbytes for values in weights.values())
    assert {path.name for path in folder.iterdir()} == {f"{name}.npy" for name in weights}
    assert_holds(folder, "numpy", weights)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_numpy_loads_what_is_written(dtype: Any, tmp_path: Path) -> None:
    weights = weights_of(tiny(), Head.CAUSAL_LM, dtype)
    write(tmp_path, "numpy", weights, tiny())
    for name, wanted in weights.items():
        found = np.load(tmp_path / f"{name}.npy", allow_pickle=False)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    assert_reads_by_part(tmp_path, "numpy", weights)


def test_numpy_loads_bfloat16_as_bits_to_be_named(tmp_path: Path) -> None:
    weights = weights_of(tiny(), Head.CAUSAL_LM, ml_dtypes.bfloat16)
    write(tmp_path, "numpy", weights, tiny())
    found = np.load(tmp_path / f"{NAME}.npy", allow_pickle=False)
    assert found.dtype == np.dtype("V2")
    np.testing.assert_array_equal(found.view(ml_dtypes.bfloat16), weights[NAME])
    np.save(tmp_path / f"{NAME}.npy", weights[NAME])
    assert_holds(tmp_path, "numpy", weights)


# Of others


def test_a_folder_of_flexgen_or_alpa_opens(tmp_path: Path) -> None:
    weights = weights_of(tiny(), Head.CAUSAL_LM, np.float16)
    for name, values in weights.items():
        name = name.removeprefix("model.").replace("decoder.final_layer", "decoder.layer")
        with (tmp_path / name).open("wb") as out:
            np.save(out, values)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    opened = open_checkpoint(tmp_path)
    assert opened.format == "numpy"
    assert opened.original_names["model.decoder.final_layer_norm.bias"] == "decoder.layer_norm.bias"
    assert_holds(tmp_path, "numpy", weights)
    for extra in ("lm_head.weight", "decoder.version"):
        with (tmp_path / extra).open("wb") as out:
            np.save(out, weights["model.decoder.embed_tokens.weight"])
    found = open_checkpoint(tmp_path).tensors
    assert found.keys() == weights.keys() | {"lm_head.weight"}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_version_and_order_is_read(
    version: tuple[int, int], order: Any, tmp_path: Path
) -> None:
    wanted = np.arange(15, dtype=np.float32).reshape(5, 3)
    with (tmp_path / f"{NAME}.npy").open("wb") as out:
        np.lib.format.write_array(out, np.asarray(wanted, order=order), version)
    assert_holds(tmp_path, "numpy", {NAME: wanted})
    assert_reads_by_part(tmp_path, "numpy", {NAME: wanted})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1), (2, 3, 4)])
def test_every_shape_is_read_in_either_order(shape: tuple[int, ...], tmp_path: Path) -> None:
    wanted = np.arange(np.prod(shape, dtype=int), dtype=np.float16).reshape(shape)
    for values in (wanted, np.asarray(wanted, order="F")):
        np.save(tmp_path / "x.npy", values)
        found = read_numpy_file(tmp_path / "x.npy")
        assert found.shape == shape
        np.testing.assert_array_equal(found.read(), wanted)
        np.testing.assert_array_equal(found.map(), wanted)


def test_other_folders_with_numpy_files_are_no_checkpoint(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.zeros(3))
    (tmp_path / "model.decoder.embed_tokens.weight").write_bytes(b"text")
    (tmp_path / "model.decoder.embed_positions.weight").mkdir()
    with pytest.raises(CheckpointNotFound, match="there are no weights in"):
        open_checkpoint(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    for name in (f"{NAME}.npy", "decoder.layers.0.fc1.weight.npy"):
        np.save(tmp_path / name, np.zeros((2, 2)))
    with pytest.raises(CheckpointDamaged, match=r"twice, as 'decoder\.layers"):
        open_checkpoint(tmp_path)


def test_a_stray_file_is_for_the_table_to_judge(tmp_path: Path) -> None:
    np.save(tmp_path / f"{NAME}.npy", np.zeros((2, 2)))
    np.save(tmp_path / "stray.npy", np.zeros(2))
    assert open_checkpoint(tmp_path).tensors.keys() == {NAME, "stray"}


# Damage


def file(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin1")
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(1,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


GOOD = file(described(), b"1234")
HUGE = described(shape="(1, 4000000000)")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "of 0 bytes is cut short, damaged or no NumPy file"),
        (b"\x93NUMPY\x01\x00", "of 8 bytes is cut short"),
        (GOOD.replace(b"NUMPY", b"NUMPA"), "it begins with b'\\x93NUMPA"),
        (GOOD.replace(b"\x01\x00", b"\x04\x00", 1), "a version from 1 to 3"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"x" * 99, "its header is said to take 65535 bytes"),
        (file(" " * 5000, version=2), "said to take 5000 bytes, expected at most 4096"),
        (GOOD[:-1], "shape (1,) and type float32 takes 4 bytes, found 3"),
        (GOOD + GOOD, "takes 4 bytes, found"),
        (file(HUGE, b"1234"), "takes 16000000000 bytes, found 4"),
        (file(described(shape="(4611686018427387904, 0)")), "takes 0 bytes, found 0"),
        (file(described("'>f4'"), b"1234"), "has type '>f4', expected one of"),
        (file(described("'<c8'"), b"12345678"), "has type '<c8'"),
        (file(described("'<V4'"), b"1234"), "has type '<V4'"),
        (file(described("[('a', '<f4')]"), b"1234"), "it is too deep"),
        (file(described("4"), b"1234"), "it names no type, order and shape"),
        (file(described(order="1"), b"1234"), "it names no type, order and shape"),
        (file(described(shape="1"), b"1234"), "it names no type, order and shape"),
        (file(described(shape="(-1,)"), b"1234"), "its shape is none"),
        (file(described(shape="(True,)"), b"1234"), "its shape is none"),
        (file(described(shape="(" + "1," * 33 + ")"), b"1234"), "its shape is none"),
        (file("{'descr': '<f4'}", b"1234"), "'fortran_order'"),
        (file("[1]"), "describes no tensor"),
        (file("__import__('os')"), "describes no tensor"),
        (file("-" * 4000), "describes no tensor"),
        (file("(" * 4000), "it is too deep"),
        (file("\xff" * 9), "describes no tensor"),
        (file("'\0'"), "describes no tensor"),
        (file(described(shape="(" + "9" * 4000 + ",)")), "its shape is none"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, data: bytes, fault: str) -> None:
    path = tmp_path / f"{NAME}.npy"
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=re.escape(fault)) as caught:
        read_numpy_folder(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 900


def test_the_file_that_those_are_made_of_is_sound(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(GOOD)
    assert read_numpy_file(tmp_path / "x.npy").read().tobytes() == b"1234"


@pytest.mark.parametrize("kind", ["'O'", "'|O'", "'|O8'"])
def test_python_objects_are_refused_and_nothing_in_them_runs(kind: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    out = io.BytesIO()
    np.save(out, np.array([Trap()], dtype=object), allow_pickle=True)
    path = tmp_path / f"{NAME}.npy"
    path.write_bytes(file(described(kind), out.getvalue()[128:]))
    with pytest.raises(CheckpointUnsafe, match=r"fc1\.weight\.npy holds Python objects"):
        open_checkpoint(tmp_path)
    path.write_bytes(out.getvalue())
    with pytest.raises(CheckpointUnsafe, match="nothing was read"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "c:x", "", ".", "..", "a\0"])
def test_no_tensor_is_written_outside_its_folder(name: str) -> None:
    tensor = Constant((2,), np.dtype(np.float32), 0.0)
    with pytest.raises(CheckpointUnsafe, match="no name for a file of the folder"):
        numpy_pieces({name: tensor}, 10**9)


def test_a_type_that_numpy_files_cannot_say_is_refused(tmp_path: Path) -> None:
    tensor = Constant((2,), np.dtype(ml_dtypes.float8_e4m3fn), 0.0)
    (piece,) = numpy_pieces({"x.npy": tensor}, 10**9)
    with pytest.raises(CheckpointError, match="float8_e4m3fn has no place in a NumPy file"):
        piece.make(tmp_path / "x.npy", print)


def test_mutated_folders_are_refused_or_read(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=500, seed=2)
    assert report.failures == []
    assert {"read", "CheckpointDamaged", "CheckpointUnsafe"} <= report.outcomes.keys()
