"""Zip archives of plain entries, written in one pass; sums are taken while bytes are written.

Python's own zipfile takes the sum of a block, then writes it: on two cores both fit in the time
of one. The layout is that of APPNOTE.TXT, with the fields of 64 bits where a number needs them.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, NamedTuple

_ALIGNMENT = 64  # bytes; where PyTorch begins a storage, so that it can be mapped
# Numbers beyond this take 64 bits. The fields would hold twice as much, but not every reader
# takes them for unsigned.
_LARGEST = 0x7FFFFFFF
_MOST_ENTRIES = 0xFFFF
_IS_LARGE = 0xFFFFFFFF
_VERSION, _LARGE_VERSION = 20, 45
_DATE = 0x21  # 1980-01-01, the first there is: archives of equal entries are equal
_SUM_AT = 14  # where an entry's header has its sum
_MOST_BEHIND = 32  # parts that are written and still to be summed


class _Entry(NamedTuple):
    """What the directory says of an entry."""

    name: bytes
    sum: int
    size: int
    offset: int


class Archive:
    """An archive that is being written to a file, from where it stands; a context manager."""

    def __init__(self, handle: BinaryIO) -> None:
        """Begins at the start of `handle`."""
        self._handle = handle
        self._entries: list[_Entry] = []
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Archive:
        """The archive itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        """Writes the directory, unless something went wrong."""
        self._pool.shutdown()
        if fault is None:
            self._write_directory()

    def add(self, name: str, size: int, parts: Iterable[bytes | memoryview]) -> None:
        """Writes an entry of `size` bytes, which begin at a multiple of 64."""
        entry = _Entry(name.encode(), 0, size, self._handle.tell())
        self._handle.write(_header(entry))
        total = 0

        def add_to_sum(part: bytes | memoryview) -> None:
            nonlocal total
            total = zlib.crc32(part, total)

        behind: deque[Future[None]] = deque()
        for part in parts:
            behind.append(self._pool.submit(add_to_sum, part))
            self._handle.write(part)
            if len(behind) > _MOST_BEHIND:
                behind.popleft().result()
        for summed in behind:
            summed.result()
        end = self._handle.seek(0, 1)
        self._handle.seek(entry.offset + _SUM_AT)
        self._handle.write(struct.pack("<I", total))
        self._handle.seek(end)
        self._entries.append(entry._replace(sum=total))

    def _write_directory(self) -> None:
        begin = self._handle.tell()
        self._handle.writelines(map(_listed, self._entries))
        end, count = self._handle.tell(), len(self._entries)
        if begin > _LARGEST or count > _MOST_ENTRIES:
            self._handle.write(
                struct.pack(
                    "<4sQHHIIQQQQ",
                    *(b"PK\x06\x06", 44, _LARGE_VERSION, _LARGE_VERSION, 0, 0),
                    *(count, count, end - begin, begin),
                )
            )
            self._handle.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        self._handle.write(
            struct.pack(
                "<4sHHHHIIH",
                *(b"PK\x05\x06", 0, 0, min(count, _MOST_ENTRIES), min(count, _MOST_ENTRIES)),
                *(end - begin, begin if begin <= _LARGEST else _IS_LARGE, 0),
            )
        )


def _header(entry: _Entry) -> bytes:
    """What lies before an entry, filled up so that its bytes are aligned; the sum is to come."""
    large = struct.pack("<HHQQ", 1, 16, entry.size, entry.size) if entry.size > _LARGEST else b""
    start = entry.offset + 30 + len(entry.name) + len(large)
    # An extra field has four bytes of its own; PyTorch calls this one FB, too.
    padding = (-start - 4) % _ALIGNMENT
    extra = large + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    size = _IS_LARGE if large else entry.size
    fields = struct.pack(
        "<4sHHHHHIIIHH",
        *(b"PK\x03\x04", _LARGE_VERSION if large else _VERSION, 0, 0, 0, _DATE),
        *(0, size, size, len(entry.name), len(extra)),
    )
    return fields + entry.name + extra


def _listed(entry: _Entry) -> bytes:
    """An entry's record in the directory."""
    sizes = [entry.size, entry.size] if entry.size > _LARGEST else []
    offsets = [entry.offset] if entry.offset > _LARGEST else []
    numbers = [*sizes, *offsets]
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    size = _IS_LARGE if sizes else entry.size
    version = _LARGE_VERSION if numbers else _VERSION
    fields = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        *(b"PK\x01\x02", version, version, 0, 0, 0, _DATE, entry.sum, size, size),
        *(len(entry.name), len(extra), 0, 0, 0, 0, _IS_LARGE if offsets else entry.offset),
    )
    return fields + entry.name + extra
