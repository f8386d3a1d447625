"""A reader of the structure of HDF5 files: which datasets there are and where their bytes lie."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from conversion.keras_file.messages import (
    ATTRIBUTE,
    EXTERNAL,
    LAYOUT,
    LINK,
    LINK_INFO,
    SPACE,
    TABLE,
    TYPE,
    UNDEFINED,
    Message,
    Region,
    dtype_of,
    messages,
    place_of,
    shape_of,
    text_attribute,
)
from opt_core.checkpoint import CheckpointDamaged, CheckpointError, StoredFile, StoredTensor

HDF5_START = b"\x89HDF\r\n\x1a\n"
_DEEPEST = 32  # groups within groups; a checkpoint has about eight
_LONGEST_NAME = 1024
_KEPT_ATTRIBUTES = ("name", "dtype")


@dataclass
class Structure:
    """The datasets of a file by path, and the `name` and `dtype` that objects say they have."""

    datasets: dict[str, StoredTensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)


class _Entry(NamedTuple):
    name: str
    address: int


def read_structure(file: StoredFile, start: int = 0, size: int | None = None) -> Structure:
    """What an HDF5 file holds, or one that lies in `size` bytes from `start` of another file.

    Raises CheckpointDamaged for what is no sound file, CheckpointUnsafe for links and for tensors
    that lie in other files.
    """
    with file.open() as handle:
        region = Region(file, handle, start, file.size - start if size is None else size)
        try:
            structure = _walk(region, _root(region))
        except CheckpointError:
            raise
        except (struct.error, IndexError, OverflowError, ValueError) as fault:
            raise CheckpointDamaged(
                f"{file.path} is damaged or no sound HDF5 file: {fault}"
            ) from fault
        file.check(handle)
    _check_apart(file, structure.datasets)
    return structure


def _root(region: Region) -> int:
    """The address of the root group, from the block that every file begins with."""
    if region.size < 96:
        region.damaged(f"it has {region.size} bytes")
    head = region.enter(0, 96, HDF5_START)
    version = head[8]
    if version in (0, 1):
        widths, first = head[13:15], 24 if version == 0 else 28
    else:
        widths, first = head[9:11], 12
    if version > 3 or widths != b"\x08\x08":
        region.damaged(f"it is of version {version} with addresses of {widths[0]} bytes")
    base, _, end, last = struct.unpack_from("<4Q", head, first)
    if base or end > region.size:
        region.damaged(f"it should have {end} bytes from byte {base}, and has {region.size}")
    if version > 1:
        return int(last)
    return int(struct.unpack_from("<Q", head, first + 40)[0])


def _walk(region: Region, root: int) -> Structure:
    structure = Structure()
    pending = [("", root, 0)]
    while pending:
        path, address, depth = pending.pop()
        found = list(messages(region, address))
        kinds = {message.kind for message in found}
        _note_attributes(region, structure, path, found)
        if EXTERNAL in kinds:
            region.unsafe(f"dataset {path!r} lies in another file")
        if LAYOUT in kinds:
            structure.datasets[path] = _dataset(region, path, found)
        elif not kinds & {TABLE, LINK, LINK_INFO}:
            region.damaged(f"{path!r} is neither a group nor a dataset")
        elif depth == _DEEPEST:
            region.damaged(f"its groups are more than {_DEEPEST} deep")
        else:
            for entry in _children(region, path, found):
                inner = f"{path}/{entry.name}" if path else entry.name
                region.spend()
                region.spend(len(inner))
                pending.append((inner, entry.address, depth + 1))
    return structure


def _note_attributes(region: Region, structure: Structure, path: str, found: list[Message]) -> None:
    for message in found:
        if message.kind == ATTRIBUTE:
            text = text_attribute(region, message.data)
            if text is not None and text[0] in _KEPT_ATTRIBUTES:
                structure.attributes.setdefault(path, {})[text[0]] = text[1]


def _dataset(region: Region, path: str, found: list[Message]) -> StoredTensor:
    parts = {message.kind: message for message in found}
    if not {SPACE, TYPE, LAYOUT} <= parts.keys():
        region.damaged(f"dataset {path!r} lacks its shape or its type")
    shape, dtype = shape_of(parts[SPACE].data), dtype_of(parts[TYPE].data)
    size = math.prod(shape) * dtype.itemsize
    offset = place_of(region, parts[LAYOUT], size, path)
    return StoredTensor(region.file, offset, shape, dtype)


def _children(region: Region, path: str, found: list[Message]) -> Iterator[_Entry]:
    names = set()
    for message in found:
        entries: Iterator[_Entry] = iter(())
        if message.kind == TABLE:
            entries = _in_table(region, path, *struct.unpack_from("<QQ", message.data))
        elif message.kind == LINK:
            entries = iter([_link(region, path, message.data)])
        elif message.kind == LINK_INFO:
            _check_no_heap(region, path, message.data)
        for entry in entries:
            if entry.name in names or entry.name in ("", ".", "..") or "/" in entry.name:
                region.damaged(f"{path!r} holds {entry.name!r}, which is twice there or no name")
            names.add(entry.name)
            yield entry


def _in_table(region: Region, path: str, tree: int, heap: int) -> Iterator[_Entry]:
    """The entries of a group as HDF5 wrote them before 1.8, and h5py does unless told otherwise."""
    size, _, place = struct.unpack_from("<3Q", region.enter(heap, 32, b"HEAP"), 8)
    names = region.take(place, size)
    pending = [tree]
    while pending:
        address = pending.pop()
        head = region.enter(address, 8)
        if head.startswith(b"SNOD"):
            (count,) = struct.unpack_from("<H", head, 6)
            table = region.take(address + 8, 40 * count)
            for offset, target, cached in struct.iter_unpack("<QQI20x", table):
                end = names.index(b"\0", offset, offset + _LONGEST_NAME)
                name = names[offset:end].decode()
                if cached == 2:
                    region.unsafe(f"{name!r} in {path!r} is a link")
                yield _Entry(name, target)
        elif head.startswith(b"TREE") and head[4] == 0:
            (count,) = struct.unpack_from("<H", head, 6)
            children = region.take(address + 24, 16 * count)
            pending += [child for _, child in struct.iter_unpack("<QQ", children)]
        else:
            region.damaged(f"the entries of {path!r} are not at byte {address}")


def _link(region: Region, path: str, data: bytes) -> _Entry:
    """An entry of a group as HDF5 1.8 and later keeps it."""
    flags, position = data[1], 2
    kind = data[position] if flags & 8 else 0
    position += bool(flags & 8) + (8 if flags & 4 else 0) + bool(flags & 16)
    width = 1 << (flags & 3)
    length = int.from_bytes(data[position : position + width], "little")
    position += width
    name = data[position : position + length].decode()
    if kind:
        region.unsafe(f"{name!r} in {path!r} is a link, perhaps to another file")
    return _Entry(name, struct.unpack_from("<Q", data, position + length)[0])


def _check_no_heap(region: Region, path: str, data: bytes) -> None:
    (heap,) = struct.unpack_from("<Q", data, 10 if data[1] & 1 else 2)
    if heap != UNDEFINED:
        region.damaged(
            f"the entries of {path!r} are kept as only HDF5 1.8 and later can; rewrite the file "
            "with `h5repack --low=0 --high=0 OLD NEW`"
        )


def _check_apart(file: StoredFile, datasets: dict[str, StoredTensor]) -> None:
    """CheckpointDamaged where two datasets share bytes: a small file could claim any size."""
    end = 0
    for name, tensor in sorted(datasets.items(), key=lambda item: item[1].offset):
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size and tensor.offset < end:
            raise CheckpointDamaged(
                f"{file.path}: dataset {name!r} at byte {tensor.offset} overlaps another one"
            )
        end = max(end, tensor.offset + size)
