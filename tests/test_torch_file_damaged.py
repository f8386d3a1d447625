"""Files that are no state dict, are damaged, or mean harm: refused at once, and nothing runs."""

import contextlib
import io
import pickle
import re
import resource
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import open_checkpoint, read_torch_file
from conversion.torch_file import LEGACY_START
from conversion.torch_file.pickles import Pickles
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from tests.fuzz.mutating import fuzz
from tests.fuzz.torch_file import target
from tests.test_torch_file import repacked, torch_save

torch = pytest.importorskip("torch")


class Runs:
    """Unpickling this calls `call(*arguments)`."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(open, "ran", "w"), r"(io|_io)\.open"),
        (Runs(eval, "open('ran', 'w')"), r"(builtins|__builtin__)\.eval"),
        (Runs(subprocess.call, ["touch", "ran"]), r"(subprocess|commands)\.call"),
        (np.zeros(3), r"numpy\._?core\.multiarray\._reconstruct"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (torch.zeros(1, dtype=torch.complex64), r"torch\.ComplexFloatStorage"),
    ],
)
def test_a_name_that_no_state_dict_needs_is_refused_and_nothing_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: object,
    name: str,
    zipped: bool,
    protocol: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = torch_save({"x": torch.zeros(1), "y": value}, tmp_path / "x.bin", zipped, protocol)
    with pytest.raises(CheckpointUnsafe, match=rf"x\.bin asks for '{name}'.*nothing was run"):
        read_torch_file(path)
    assert not (tmp_path / "ran").exists()


def archive(path: Path, pickled: bytes, **entries: bytes) -> Path:
    """An archive as PyTorch writes them, with any pickle."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/data.pkl", pickled)
        for name, data in entries.items():
            out.writestr(f"a/{name.replace('_', '/')}", data)
    return path


GLOBAL = b"ccollections\nOrderedDict\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor(
    storage: bytes = STORAGE, view: bytes = b"K\x00K\x04\x85K\x01\x85", more: bytes = b"\x89N"
) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00x" + TENSOR + b"(" + storage + view + more + b"tRs."


@pytest.mark.parametrize("shape", [b"K\x04\x85", b"ctorch\nSize\nK\x04\x85\x85R"])
def test_a_hand_made_archive_is_read(tmp_path: Path, shape: bytes) -> None:
    pickled = tensor(view=b"K\x00" + shape + b"K\x01\x85")
    path = archive(tmp_path / "x.bin", pickled, data_0=np.arange(4, dtype=np.float32).tobytes())
    assert read_torch_file(path)["x"].read().tolist() == [0, 1, 2, 3]


NESTED = b"\x80\x02)" + b"q\x00h\x00\x86" * 100  # a tuple that takes 2 ** 100 steps to hash


@pytest.mark.parametrize(
    ("pickled", "kind", "fault"),
    [
        (b"", CheckpointDamaged, "is cut short: its pickle goes on for 1 bytes, 0 are left"),
        (b"\x80\x02}", CheckpointDamaged, "is cut short"),
        (b"\x80\x00}.", CheckpointDamaged, "pickle protocol 0, expected 2 to 5"),
        (b"\x80\x02.", CheckpointDamaged, "holds no valid pickle: pop from empty list"),
        (b"\x80\x02\xff.", CheckpointDamaged, "is no instruction of a state dict"),
        (b"\x80\x02ccollections", CheckpointDamaged, "its pickle ends within a name"),
        (b"\x80\x02iposix\nsystem\n.", CheckpointUnsafe, "instruction INST, which can run code"),
        (b"\x80\x02" + GLOBAL + b")\x81.", CheckpointUnsafe, "instruction NEWOBJ, which can"),
        (b"\x80\x02K\x01)R.", CheckpointUnsafe, "calls a int, which no state dict needs"),
        (b"\x80\x02" + GLOBAL + b"K\x01R.", CheckpointUnsafe, "calls a Maker"),
        (b"\x80\x02" + GLOBAL + b"K\x01\x85R.", CheckpointDamaged, "takes 0 positional arguments"),
        (b"\x80\x02K\x01K\x02\x93.", CheckpointDamaged, "a global's name is no text"),
        (b"\x80\x02K\x01Nb.", CheckpointDamaged, "it sets attributes of a int"),
        (b"\x80\x02K\x01Na.", CheckpointDamaged, "it appends to a int"),
        (b"\x80\x02K\x01NNs.", CheckpointDamaged, "it sets items of a int"),
        (b"\x80\x02}NNs.", CheckpointDamaged, "a key is a NoneType, expected text or a number"),
        (b"\x80\x02}C\x01xNs.", CheckpointDamaged, "a key is a bytes, expected text or a number"),
        (b"\x80\x02}(Nu.", CheckpointDamaged, "holds no valid pickle: zip"),
        (b"\x80\x02\x86.", CheckpointDamaged, "a tuple takes more values than there are"),
        (b"\x80\x02h\x07.", CheckpointDamaged, "holds no valid pickle: 7"),
        (b"\x80\x02K\x01.", CheckpointDamaged, "holds a int, expected a state dict of tensors"),
        (b"\x80\x02}K\x01NsK\x02.", CheckpointDamaged, "holds a int, expected"),
        (b"\x80\x02}K\x07Ns.", CheckpointDamaged, "an entry is called 7, expected the name of"),
        (b"\x80\x02}\x8c\x01xNs.", CheckpointDamaged, "entry 'x' is no tensor but a NoneType;"),
        (b"\x80\x02}\x8c\x01x}s.", CheckpointDamaged, "entry 'x' is no tensor but a dict of 0"),
        (b"\x80\x02X\xff\xff\xff\xff.", CheckpointDamaged, "holds a text of 4294967295 bytes"),
        (b"\x80\x02\x8d" + b"\xff" * 8, CheckpointDamaged, "holds a text of 18446744073709551615"),
        (b"\x80\x02\x96" + b"\xff" * 8, CheckpointDamaged, "is no instruction of a state dict"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None, ""),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", CheckpointDamaged, "holds no valid pickle: 'utf-8'"),
        (b"\x80\x02}" + NESTED[2:] + b"Ns.", CheckpointDamaged, "a key is a tuple"),
        (NESTED + NESTED[2:] + b"\x93.", CheckpointDamaged, "a global's name is no text"),
        (NESTED + b"Q.", CheckpointDamaged, "it refers to something that is no storage"),
        (b"\x80\x02" + b")" + b"\x85" * 100_000 + b".", CheckpointDamaged, "holds a tuple"),
        (b"\x80\x02(((N.", CheckpointDamaged, "holds a NoneType"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused_at_once(
    tmp_path: Path, pickled: bytes, kind: type[Exception] | None, fault: str
) -> None:
    path = archive(tmp_path / "x.bin", pickled)
    if kind is None:
        assert read_torch_file(path) == {}
        return
    with pytest.raises(kind, match=re.escape(fault)) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_that_ends_while_its_pickle_is_read_is_refused(tmp_path: Path) -> None:
    pickles = Pickles(tmp_path / "x.bin", io.BytesIO(b"\x80"), 9)
    with pytest.raises(CheckpointDamaged, match=r"x\.bin was cut short while it was read"):
        pickles.load({})


def test_a_pickle_with_endless_steps_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.torch_file.pickles._MOST_STEPS", 1000)
    path = archive(tmp_path / "x.bin", b"\x80\x02" + b"N0" * 1000 + b"}.")
    with pytest.raises(CheckpointDamaged, match="takes more than 1000 steps"):
        read_torch_file(path)


FLOATS = np.zeros(4, np.float32).tobytes()


@pytest.mark.parametrize(
    ("pickled", "fault"),
    [
        (tensor(view=b"K\x01K\x04\x85K\x01\x85"), "shape (4,), strides (1,) and offset 1 does not"),
        (tensor(view=b"K\x00K\x05\x85K\x01\x85"), "tensor 'x' of shape (5,)"),
        (tensor(view=b"K\x00K\x03\x85K\x02\x85"), "strides (2,)"),
        (tensor(view=b"K\x00J\x00\x00\x00\x7f\x85K\x00\x85"), "does not lie within its storage"),
        (tensor(view=b"K\x00J\xff\xff\xff\xff\x85K\x01\x85"), "a negative offset, size or stride"),
        (tensor(view=b"K\x00\x88\x85K\x01\x85"), "or one that is no number"),
        (tensor(view=b"NK\x04\x85K\x01\x85"), "or one that is no number"),
        (tensor(view=b"K\x00K\x04\x85)"), "a tensor has 1 axes and 0 strides"),
        (tensor(view=b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t"), "has 65 axes"),
        (tensor(view=b"K\x00K\x04K\x01"), "a tensor has no shape"),
        (tensor(storage=b"N"), "a tensor has no storage"),
        (tensor(more=b"\x89N}(\x8c\x03neg\x88u"), "conjugated, negated or carries unknown"),
        (tensor(storage=STORAGE.replace(b"K\x04", b"K\x05")), "expected 20 bytes, holds 16 bytes"),
        (
            tensor(storage=STORAGE.replace(b"\x000X", b"\x001X")),
            "storage '1', expected 16 bytes, is",
        ),
        (tensor(storage=STORAGE.replace(b"K\x04", b"N")), "storage '0' has no size"),
        (tensor(storage=STORAGE.replace(b"K\x04", b"K\x04K\x04")), "or is a view of another one"),
        (tensor(storage=STORAGE.replace(b"ctorch\nFloatStorage\n", b"N")), "a storage has no type"),
        (tensor(storage=STORAGE.replace(b"storage", b"garbage")), "a storage has no type"),
        (
            tensor(storage=STORAGE.replace(b"K\x04t", b"t")),
            "refers to something that is no storage",
        ),
        (tensor(storage=STORAGE + STORAGE.replace(b"K\x04", b"K\x05") + b"0"), "in two ways"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n(N\x89NtR.", "a parameter holds no tensor"),
        (b"\x80\x02ctorch\nSize\nN\x85R.", "a size is no tuple"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(NK\x00))\x89NNtR.",
            "a tensor has no storage, no known type",
        ),
    ],
)
def test_a_tensor_that_its_storage_cannot_hold_is_refused(
    tmp_path: Path, pickled: bytes, fault: str
) -> None:
    path = archive(tmp_path / "x.bin", pickled, data_0=FLOATS)
    with pytest.raises(CheckpointDamaged, match=re.escape(fault)) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)


def test_a_step_along_an_axis_of_length_one_means_nothing(tmp_path: Path) -> None:
    far = b"\x8a\x08" + struct.pack("<q", 1 << 62)
    pickled = tensor(view=b"K\x00" + b"K\x01K\x02\x86" + far + b"K\x02\x86")
    path = archive(tmp_path / "x.bin", pickled, data_0=np.arange(4, dtype=np.float32).tobytes())
    found = read_torch_file(path)["x"]
    assert found.read().tolist() == found.map().tolist() == [[0, 2]]
    assert found.read(slice(1, 2), axis=1).tolist() == [[2]]


def test_a_shape_that_no_array_can_have_is_refused_though_it_holds_nothing(tmp_path: Path) -> None:
    wide = b"\x8a\x08" + struct.pack("<q", 1 << 60)
    empty = STORAGE.replace(b"K\x04", b"K\x00")
    pickled = tensor(storage=empty, view=b"K\x00K\x00" + wide + b"\x86" + b"K\x01K\x01\x86")
    path = archive(tmp_path / "x.bin", pickled, data_0=b"")
    with pytest.raises(CheckpointDamaged, match=r"x\.bin holds a tensor that no array can be"):
        read_torch_file(path)
    header = b'{"x": {"dtype": "F32", "shape": [0, 1152921504606846976], "data_offsets": [0, 0]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointDamaged, match=r"x\.safetensors"):
        open_checkpoint(tmp_path / "x.safetensors")


# Archives


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    path = torch_save({"x": torch.zeros(9)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointDamaged, match=r"entry '.*' is compressed or encrypted"):
        read_torch_file(repacked(path, method=zipfile.ZIP_DEFLATED))


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", tensor(), data_0=FLOATS, byteorder=b"big")
    with pytest.raises(CheckpointDamaged, match="byte order b'big', expected b'little'"):
        read_torch_file(path)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as out:
        out.writestr("config.json", "{}")
    with pytest.raises(
        CheckpointDamaged, match=r"no checkpoint of PyTorch's: it has no entry data"
    ):
        read_torch_file(tmp_path / "x.keras")


def test_an_archive_whose_directory_lies_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", tensor(), data_0=FLOATS)
    data = path.read_bytes()
    place = data.rindex(b"PK\x01\x02")
    sizes = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data[: place + 20] + sizes + data[place + 28 :])
    with pytest.raises(CheckpointDamaged, match="expected 16 bytes, holds 1073741824 bytes"):
        read_torch_file(path)
    first = data.index(b"PK\x01\x02")
    path.write_bytes(data[: first + 20] + sizes + data[first + 28 :])
    with pytest.raises(CheckpointDamaged, match="goes beyond the end of the file of"):
        read_torch_file(path)
    path.write_bytes(
        data.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1)
    )
    with pytest.raises(CheckpointDamaged, match="entry 'a/data/0' has no header"):
        read_torch_file(path)
    place = data.rindex(b"PK\x05\x06") + 16
    path.write_bytes(data[:place] + struct.pack("<I", 1 << 30) + data[place + 4 :])
    with pytest.raises(CheckpointDamaged, match=r"entry 'a/data\.pkl' has no header"):
        read_torch_file(path)


# The older layout


def legacy(*pickles: object, tail: bytes = b"") -> bytes:
    parts = [part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in pickles]
    return LEGACY_START + b"".join(parts) + tail


MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
STORED = struct.pack("<q", 4) + FLOATS


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (legacy(), "is empty, damaged or no file of PyTorch's"),
        (legacy(1002, MACHINE), "is empty, damaged or no file of PyTorch's"),
        (pickle.dumps({"x": 1}, 2), "is empty, damaged or no file of PyTorch's"),
        (legacy(1001, MACHINE | {"little_endian": False}), "not written by a little-endian"),
        (legacy(1001, b"\x80\x02NQ."), "it refers to a storage where none may be"),
        (legacy(1001, []), "not written by a little-endian machine"),
        (legacy(1001, MACHINE, {"x": 3}, []), "entry 'x' is no tensor but a int"),
        (legacy(1001, MACHINE, tensor(), []), "the list of storages is not that of the tensors"),
        (legacy(1001, MACHINE, tensor(), ["0", "0"]), "the list of storages is not that"),
        (legacy(1001, MACHINE, tensor(), "0"), "the list of storages is not that"),
        (legacy(1001, MACHINE, tensor(), ["0"]), "is cut short"),
        (
            legacy(1001, MACHINE, tensor(), ["0"], tail=STORED[:-1]),
            "expected 16 more bytes, 15 are",
        ),
        (
            legacy(1001, MACHINE, tensor(), ["0"], tail=struct.pack("<q", 1 << 40)),
            "storage '0', expected 16 bytes, holds 4398046511104",
        ),
        (legacy(tensor()), "asks for 'torch._utils._rebuild_tensor_v2'"),
    ],
)
def test_a_damaged_file_of_the_older_layout_is_refused(
    tmp_path: Path, data: bytes, fault: str
) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(fault)):
        read_torch_file(tmp_path / "x.bin")


def test_a_whole_file_of_the_older_layout_is_read(tmp_path: Path) -> None:
    data = legacy(1001, MACHINE, tensor(), ["0"], tail=STORED)
    (tmp_path / "x.bin").write_bytes(data)
    assert read_torch_file(tmp_path / "x.bin")["x"].read().tolist() == [0, 0, 0, 0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"there is no file .*gone\.bin"):
        read_torch_file(tmp_path / "gone.bin")


# Any damage at all


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more memory than the process has, and 1 GiB."""
    size = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)


@given(data=st.data(), zipped=st.booleans())
def test_a_file_cut_anywhere_or_with_changed_bytes_is_read_or_refused(
    data: st.DataObject, zipped: bool, tmp_path: Path, little_memory: None
) -> None:
    path = torch_save({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, tmp_path / "x.bin", zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError):
        for found in read_torch_file(path).values():
            found.read()
            found.map()


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=300, seed=7)
    assert report.failures == []
    assert {"read", "CheckpointDamaged", "CheckpointUnsafe"} <= report.outcomes.keys()
