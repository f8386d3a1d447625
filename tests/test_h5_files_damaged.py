"""HDF5 files that no checkpoint is like, are damaged, or mean harm: refused at once, by name."""

import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from conversion import open_checkpoint
from conversion.keras_file import read_tf
from opt_core.checkpoint import CheckpointDamaged, CheckpointError, CheckpointUnsafe, StoredTensor
from opt_core.weights import Head
from tests.cases import tiny
from tests.fuzz.h5 import target
from tests.fuzz.mutating import fuzz
from tests.test_h5_files import FILE, made
from tests.written import weights_of, write

ONES = np.ones(4, np.float32)


def with_virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(4,))
    file.create_virtual_dataset("a", layout)


def with_soft_link(file: Any) -> None:
    file["b"] = ONES
    file["a"] = h5py.SoftLink("/b")


@pytest.mark.parametrize("libver", [None, "latest"])
@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (with_soft_link, "'a' in '' is a link"),
        (lambda f: f.update(a=h5py.ExternalLink("other.h5", "/x")), "'a' in '' is a link"),
        (
            lambda f: f.create_dataset("a", (4,), "f4", external=[("other.bin", 0, 16)]),
            "dataset 'a' lies in another file",
        ),
        (with_virtual, "dataset 'a' is virtual"),
    ],
    ids=["soft link", "external link", "external file", "virtual"],
)
def test_what_leads_out_of_the_file_is_unsafe(
    tmp_path: Path, make: Any, fault: str, libver: str | None
) -> None:
    made(tmp_path / "other.h5", lambda file: file.update(x=ONES))
    (tmp_path / "other.bin").write_bytes(ONES.tobytes())
    path = made(tmp_path / FILE, make, libver=libver)
    with pytest.raises(CheckpointUnsafe, match=rf"{FILE}: .*{fault}.*Nothing was opened"):
        open_checkpoint(path)


def same_twice(file: Any) -> None:
    file["a"] = ONES
    file["b"] = file["a"]


def shared_type(file: Any) -> None:
    file["type"] = np.dtype("f4")
    file.create_dataset("a", (4,), dtype=file["type"])


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (
            lambda f: f.create_dataset("a", (8,), "f4", chunks=(4,), compression="gzip"),
            "dataset 'a' is stored in chunks.*rewrite the file with `h5repack -l CONTI",
        ),
        (lambda f: f.create_dataset("a", (4,), "f4"), "takes 16 bytes, but 0 are stored"),
        (same_twice, "two parts of it lead to byte"),
        (shared_type, "lies elsewhere, which no checkpoint needs|neither a group nor a dataset"),
        (lambda f: f.create_group("/".join("a" * 40)), "groups are more than 32 deep"),
    ],
    ids=["chunks", "never written", "twice", "shared type", "deep"],
)
def test_what_no_checkpoint_needs_is_refused(tmp_path: Path, make: Any, fault: str) -> None:
    with pytest.raises(CheckpointDamaged, match=rf"{FILE} is damaged .*({fault})"):
        open_checkpoint(made(tmp_path / FILE, make))


def test_a_group_that_only_new_versions_can_read_is_refused_with_advice(tmp_path: Path) -> None:
    path = made(
        tmp_path / FILE, lambda f: [f.create_group(str(i)) for i in range(20)], libver="latest"
    )
    with pytest.raises(CheckpointDamaged, match="rewrite the file"):
        open_checkpoint(path)


# What is damaged


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sound")
    write(folder, "tf", weights_of(tiny(), Head.CAUSAL_LM), tiny())
    return (folder / FILE).read_bytes()


def test_a_file_cut_anywhere_is_damaged(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / FILE
    for size in [*range(0, 200, 8), *range(200, len(sound), 997), len(sound) - 1]:
        path.write_bytes(sound[:size])
        with pytest.raises(CheckpointDamaged, match=re.escape(str(path))):
            open_checkpoint(path)


def test_a_group_that_holds_itself_ends(tmp_path: Path) -> None:
    path = made(tmp_path / FILE, lambda file: file.create_dataset("inner/a", data=ONES))
    content = bytearray(path.read_bytes())
    root = content[64:72]
    table = content.index(b"SNOD")
    content[table + 16 : table + 24] = root
    path.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="two parts of it lead to byte 96"):
        open_checkpoint(path)


def test_datasets_that_share_bytes_are_refused(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file["a"], file["b"] = np.arange(4.0), np.arange(4.0)

    path = made(tmp_path / FILE, fill)
    first, second = sorted(tensor.offset for tensor in read_tf(path).values())
    content = path.read_bytes()
    assert content.count(struct.pack("<Q", second)) == 1
    path.write_bytes(content.replace(struct.pack("<Q", second), struct.pack("<Q", first)))
    with pytest.raises(CheckpointDamaged, match="overlaps another one"):
        open_checkpoint(path)


def test_sizes_that_a_file_merely_claims_take_no_memory(tmp_path: Path) -> None:
    path = made(tmp_path / FILE, lambda file: file.create_dataset("a", data=ONES))
    content = path.read_bytes()
    tracemalloc.start()
    for size in (5, 2**20, 2**40):
        shape = struct.pack("<Q", 4)
        at = content.index(shape * 2)  # the shape, and the largest one it may grow to
        path.write_bytes(content[:at] + struct.pack("<QQ", size, size) + content[at + 16 :])
        with pytest.raises(CheckpointDamaged, match=rf"'a' takes {4 * size} bytes, but 16 are"):
            open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("axes", [(2**64 - 1, 4), (2**63, 0), (2**40, 2**40)])
def test_a_shape_that_no_array_can_have_is_refused(tmp_path: Path, axes: tuple[int, int]) -> None:
    path = made(tmp_path / FILE, lambda file: file.create_dataset("a", data=np.ones((3, 5))))
    content = path.read_bytes()
    shape = struct.pack("<QQ", 3, 5) * 2
    assert content.count(shape) == 1
    path.write_bytes(content.replace(shape, struct.pack("<QQ", *axes) * 2))
    with pytest.raises(CheckpointDamaged, match="a data space has the shape"):
        open_checkpoint(path)


def test_a_text_that_claims_to_be_long_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / FILE, lambda file: file.attrs.update(what="x", name="text"))
    content = path.read_bytes()
    at = content.index(b"GCOL") + 24  # the size of the first text
    path.write_bytes(content[:at] + b"\xf0" + b"\xff" * 7 + content[at + 8 :])
    with pytest.raises(CheckpointDamaged, match=FILE):
        open_checkpoint(path)


def test_a_header_without_end_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    count, size = 16, 2**20 - 16

    def following(number: int) -> bytes:
        return struct.pack("<BHBQQ", 0x10, 16, 0, 256 + number * size, size)

    head = b"\x89HDF\r\n\x1a\n" + bytes([2, 8, 8, 0])
    head += struct.pack("<4Q", 0, 2**64 - 1, 256 + count * size, 96)
    first = b"OHDR" + bytes([2, 0, 20]) + following(0)
    content = head.ljust(96, b"\0") + first.ljust(160, b"\0")
    for number in range(count):
        content += (b"OCHK" + following(number + 1)).ljust(size, b"\0")
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="its structure takes more than"):
        read_tf(tmp_path / FILE)


def test_paths_that_multiply_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        group = file.create_group("/".join(["long" * 250] * 25))
        for number in range(3000):
            group.create_group(f"{number}")

    with pytest.raises(CheckpointDamaged, match="its structure takes more than"):
        read_tf(made(tmp_path / FILE, fill))


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / FILE
    path.write_bytes(sound)
    tensors: dict[str, StoredTensor] = read_tf(path)
    path.write_bytes(sound + b"more")
    with pytest.raises(CheckpointDamaged, match="has changed since"):
        next(iter(tensors.values())).read()


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=600, seed=0)
    assert report.failures == []
    assert {"read", "CheckpointDamaged", "CheckpointUnsafe"} <= report.outcomes.keys()


def test_no_error_is_foreign(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    with pytest.raises(CheckpointError, match=FILE):
        open_checkpoint(tmp_path)
