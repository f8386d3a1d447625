"""The objects of an HDF5 file: headers made of messages, and what each message says."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from io import FileIO
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from opt_core.checkpoint import CheckpointDamaged, CheckpointUnsafe, StoredFile

UNDEFINED = (1 << 64) - 1  # an address that is none
SPACE, LINK_INFO, TYPE, EXTERNAL, LINK, LAYOUT = 0x01, 0x02, 0x03, 0x07, 0x06, 0x08
ATTRIBUTE, CONTINUATION, TABLE = 0x0C, 0x10, 0x11

_MOST_STRUCTURE = 1 << 26  # bytes in all; a tensor of a sound file takes about 3000
_ITEM_BYTES = 128  # what a message or an entry costs in memory, besides its text
_LARGEST_BLOCK = 1 << 20
_MOST_AXES = 32  # of HDF5
_SHARED = 2  # a flag: the message lies elsewhere

# A float is known by its size, then the bits of its class, its precision and its fields.
_FLOATS: dict[tuple[int, ...], np.dtype[Any]] = {
    (8, 63, 64, 52, 11, 0, 52, 1023): np.dtype(np.float64),
    (4, 31, 32, 23, 8, 0, 23, 127): np.dtype(np.float32),
    (2, 15, 16, 10, 5, 0, 10, 15): np.dtype(np.float16),
    (2, 15, 16, 7, 8, 0, 7, 127): np.dtype(ml_dtypes.bfloat16),
}


class Message(NamedTuple):
    """One message of an object's header, and where in the file its content lies."""

    kind: int
    address: int
    data: bytes


class Region:
    """The bytes of an HDF5 file, or of one inside another file, handed out within bounds.

    Each block of structure may be entered once, and all of them together have a limited size: so a
    file can neither lead in circles nor make its reader work for ever.
    """

    def __init__(self, file: StoredFile, handle: FileIO, start: int, size: int) -> None:
        """`size` bytes from `start` of an open file."""
        self.file, self.start, self.size = file, start, size
        self._handle = handle
        self._left = _MOST_STRUCTURE
        self._entered: set[int] = set()

    def enter(self, address: int, size: int, mark: bytes = b"") -> bytes:
        """The first bytes of a block of structure that no other part of the file has led to."""
        if address in self._entered:
            self.damaged(f"two parts of it lead to byte {address}")
        self._entered.add(address)
        data = self.take(address, size)
        if not data.startswith(mark):
            self.damaged(f"expected {mark!r} at byte {address}, found {data[: len(mark)]!r}")
        return data

    def take(self, address: int, size: int) -> bytes:
        """`size` bytes of structure at an address."""
        if not 0 <= size <= _LARGEST_BLOCK:
            self.damaged(f"it claims {size} bytes of structure at byte {address}")
        if address + size > self.size:
            self.damaged(f"it leads to byte {address + size}, but has {self.size}")
        self.spend(size)
        data = os.pread(self._handle.fileno(), size, self.start + address)
        if len(data) != size:
            self.damaged("it was cut short while it was read")
        return data

    def spend(self, size: int = _ITEM_BYTES) -> None:
        """Counts bytes of structure, or of what is made of it, against what a file may take."""
        self._left -= size
        if self._left < 0:
            self.damaged(f"its structure takes more than {_MOST_STRUCTURE} bytes")

    def damaged(self, fault: str) -> NoReturn:
        """Raises CheckpointDamaged with the file's name."""
        raise CheckpointDamaged(f"{self.file.path} is damaged or no sound HDF5 file: {fault}")

    def unsafe(self, fault: str) -> NoReturn:
        """Raises CheckpointUnsafe with the file's name."""
        raise CheckpointUnsafe(
            f"{self.file.path}: {fault}; a checkpoint holds its tensors itself. Nothing was opened"
        )


def messages(region: Region, address: int) -> Iterator[Message]:
    """All messages of the object whose header lies at the address."""
    start = region.enter(address, 16)
    if start.startswith(b"OHDR"):
        yield from _new_header(region, address, start)
        return
    if start[0] != 1:
        region.damaged(f"there is no object at byte {address}")
    count, size = struct.unpack_from("<H4xI", start, 2)
    pending = [(address + 16, size)]
    while pending:
        place, size = pending.pop()
        for message in _old_block(place, region.take(place, size)):
            region.spend()
            count -= 1
            if message.kind == CONTINUATION:
                pending.append(_continued(region, message))
            yield message
    if count:
        region.damaged(f"the header at byte {address} has {-count:+} messages more than it says")


def _old_block(place: int, data: bytes) -> Iterator[Message]:
    position = 0
    while position + 8 <= len(data):
        kind, size, flags = struct.unpack_from("<HHB", data, position)
        position += 8
        yield _message(kind, place + position, data[position : position + size], size, flags)
        position += size


def _new_header(region: Region, address: int, start: bytes) -> Iterator[Message]:
    """The header of HDF5 1.8 and later; its check sums are left to other tools."""
    flags = start[5]
    position = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = int.from_bytes(region.take(address + position, width), "little")
    position += width
    pending = [(address + position, size)]
    while pending:
        place, size = pending.pop()
        for message in _new_block(place, region.take(place, size), bool(flags & 4)):
            region.spend()
            if message.kind == CONTINUATION:
                other, size = _continued(region, message)
                if size < 8 or region.take(other, 4) != b"OCHK":
                    region.damaged(f"the header at byte {address} does not go on at byte {other}")
                pending.append((other + 4, size - 8))
            yield message


def _new_block(place: int, data: bytes, numbered: bool) -> Iterator[Message]:
    position, head = 0, 6 if numbered else 4
    while position + head <= len(data):
        kind, size, flags = struct.unpack_from("<BHB", data, position)
        position += head
        yield _message(kind, place + position, data[position : position + size], size, flags)
        position += size


def _message(kind: int, address: int, data: bytes, size: int, flags: int) -> Message:
    if len(data) != size:
        raise ValueError(f"a message at byte {address} goes beyond its header")
    if flags & _SHARED and kind in (SPACE, TYPE, LAYOUT, EXTERNAL, LINK, TABLE):
        raise ValueError(f"the message at byte {address} lies elsewhere, which no checkpoint needs")
    return Message(kind, address, data)


def _continued(region: Region, message: Message) -> tuple[int, int]:
    address, size = struct.unpack_from("<QQ", message.data)
    region.enter(address, 0)
    return address, size


def shape_of(data: bytes) -> tuple[int, ...]:
    """The lengths of the axes that a message of a data space gives."""
    version, axes = data[0], data[1]
    if version not in (1, 2) or axes > _MOST_AXES or (version == 2 and data[3] == 2):
        raise ValueError(f"a data space has version {version} and {axes} axes")
    shape = struct.unpack_from(f"<{axes}Q", data, 8 if version == 1 else 4)
    if math.prod(n or 1 for n in shape) >> 48:  # more than NumPy takes, even of no values at all
        raise ValueError(f"a data space has the shape {shape}")
    return shape


def dtype_of(data: bytes) -> np.dtype[Any]:
    """The type that a message gives; what is no plain number is plain bytes of its size."""
    kind, bits, (size,) = data[0] & 15, data[1:4], struct.unpack_from("<I", data, 4)
    order = ">" if bits[0] & 1 else "<"
    if kind == 0 and size in (1, 2, 4, 8) and struct.unpack_from("<HH", data, 8) == (0, 8 * size):
        return np.dtype(f"{order}{'i' if bits[0] & 8 else 'u'}{size}")
    if kind == 1 and bits[0] & 0xFE == 0x20:
        offset, *fields = struct.unpack_from("<HHBBBBI", data, 8)
        found = _FLOATS.get((size, bits[1], *fields))
        if found is not None and offset == 0:
            return found if order == "<" else found.newbyteorder(">")
    if not 0 < size <= 1 << 16:
        raise ValueError(f"a value takes {size} bytes")
    return np.dtype(f"V{size}")


def place_of(region: Region, message: Message, size: int, name: str) -> int:
    """Where the `size` bytes of a dataset lie, given the message of its layout."""
    data = message.data
    version, kind = data[0], data[1]
    if version not in (3, 4):
        region.damaged(f"dataset {name!r} has a layout of version {version}, expected 3 or 4")
    if kind == 3:
        region.unsafe(f"dataset {name!r} is virtual: it is made of other datasets")
    if kind == 2:
        region.damaged(
            f"dataset {name!r} is stored in chunks, perhaps compressed, which no Keras does to "
            "weights; rewrite the file with `h5repack -l CONTI -f NONE OLD NEW`"
        )
    if kind == 0:
        (found,) = struct.unpack_from("<H", data, 2)
        address = message.address + 4
    else:
        address, found = struct.unpack_from("<QQ", data, 2)
    if address == UNDEFINED:
        found, address = 0, 0
    if found != size or address + size > region.size:
        region.damaged(
            f"dataset {name!r} takes {size} bytes, but {found} are stored at byte {address} of "
            f"{region.size}"
        )
    return region.start + address


def text_attribute(region: Region, data: bytes) -> tuple[str, str] | None:
    """Name and value of an attribute that is one text, else None."""
    version = data[0]
    lengths = struct.unpack_from("<3H", data, 2)
    position = 9 if version == 3 else 8
    parts = []
    for length in lengths:
        parts.append(data[position : position + length])
        position += length + (-length % 8 if version == 1 else 0)
    name, kind, space = parts
    if not 1 <= version <= 3 or math.prod(shape_of(space)) != 1:
        return None
    value = data[position:]
    if kind[0] & 15 == 9 and kind[1] & 15 == 1:
        length, address, index = struct.unpack_from("<IQI", value)
        value = _from_heap(region, address, index)[:length]
    elif kind[0] & 15 != 3:
        return None
    return name.rstrip(b"\0").decode(), value.rstrip(b"\0").decode()


def _from_heap(region: Region, address: int, index: int) -> bytes:
    """An object of a collection of texts."""
    head = region.take(address, 16)
    (size,) = struct.unpack_from("<Q", head, 8)
    if not head.startswith(b"GCOL"):
        region.damaged(f"there is no text at byte {address}")
    data, position = region.take(address, size), 16
    found, length = struct.unpack_from("<H6xQ", data, position)
    while found != index:
        position += 16 + length + -length % 8
        found, length = struct.unpack_from("<H6xQ", data, position)
    return data[position + 16 : position + 16 + length]
