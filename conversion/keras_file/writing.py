"""A writer of HDF5 files that holds no tensor: h5py makes the structure, then the bytes stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from conversion.pieces import Count
from opt_core.checkpoint import TensorSource, blocks, size_of

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PAGE_BYTES = 4096
_ALIGNMENT = 64  # bytes; then tensors can be used where they lie in a mapped file

Attributes = Mapping[str, Mapping[str, "str | list[str]"]]


@dataclass(frozen=True)
class Layout:
    """What a file holds: tensors by the path of their dataset, attributes by that of their object.

    The root's path is "". With `opaque`, bfloat16 is written as Keras 3 does, as two bytes without
    a meaning; else as a float that HDF5 itself converts for whoever does not know it.
    """

    tensors: Mapping[str, TensorSource]
    attributes: Attributes = field(default_factory=dict)
    opaque: bool = False


def hdf5_file(layout: Layout, count: Count) -> tuple[int, Iterator[bytes | memoryview]]:
    """An HDF5 file in the layout of HDF5 1.6 to 1.14: its size, and its bytes piece by piece."""
    pages = _Pages()
    places = _write_structure(pages, layout)
    return pages.size, _filled(pages, places, count)


def _filled(
    pages: _Pages, places: list[tuple[int, TensorSource]], count: Count
) -> Iterator[bytes | memoryview]:
    end = 0
    for offset, tensor in sorted(places, key=lambda place: place[0]):
        yield pages.part(end, offset)
        for block in blocks(tensor):
            yield block
            count(len(block))
        end = offset + size_of(tensor)
    yield pages.part(end, pages.size)


def _write_structure(pages: _Pages, layout: Layout) -> list[tuple[int, TensorSource]]:
    """Writes everything but the bytes of the tensors; where those belong."""
    import h5py  # only here: reading does without

    options = {"alignment_threshold": _ALIGNMENT, "alignment_interval": _ALIGNMENT}
    places = []
    with h5py.File(pages, "w", libver=("earliest", "v110"), **options) as file:
        for path, tensor in layout.tensors.items():
            group, _, name = path.rpartition("/")
            parent = file.require_group(group) if group else file
            dataset = h5py.h5d.create(
                parent.id,
                name.encode(),
                _type(h5py, tensor.dtype, layout.opaque),
                h5py.h5s.create_simple(tensor.shape) if tensor.shape else h5py.h5s.create(0),
                _early(h5py),
            )
            if size_of(tensor):
                places.append((dataset.get_offset(), tensor))
        for path, attributes in layout.attributes.items():
            target = (file[path] if path in file else file.create_group(path)) if path else file
            for name, value in attributes.items():
                target.attrs[name] = value
    return places


def _early(h5py: Any) -> Any:
    """How to create a dataset that has its place at once, and nothing in it."""
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_layout(h5py.h5d.CONTIGUOUS)
    how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    how.set_obj_track_times(False)  # the same tensors make the same bytes
    return how


def _type(h5py: Any, dtype: np.dtype[Any], opaque: bool) -> Any:
    if dtype != _BFLOAT16:
        return h5py.h5t.py_create(dtype)
    if opaque:
        return h5py.h5t.create(h5py.h5t.OPAQUE, dtype.itemsize)
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)  # sign; place and size of the exponent, of the mantissa
    kind.set_precision(16)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


class _Pages:
    """A file in memory that keeps what was written and takes no room for what was left out."""

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        """As of a file."""
        return self._position

    def truncate(self, size: int) -> int:
        """As of a file."""
        self.size = size
        return size

    def flush(self) -> None:
        """Nothing."""

    def read(self, size: int) -> bytes:
        """As of a file; by having it, a file is known to h5py."""
        room = memoryview(bytearray(size))
        return bytes(room[: self.readinto(room)])

    def readinto(self, room: memoryview) -> int:
        """As of a file."""
        data = self.part(self._position, min(self._position + len(room), self.size))
        room[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: bytes | memoryview) -> int:
        """As of a file."""
        done = 0
        while done < len(data):
            page, inside = divmod(self._position + done, _PAGE_BYTES)
            piece = data[done : done + _PAGE_BYTES - inside]
            content = self._pages.setdefault(page, bytearray(_PAGE_BYTES))
            content[inside : inside + len(piece)] = piece
            done += len(piece)
        self._position += done
        self.size = max(self.size, self._position)
        return done

    def part(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; zeros where nothing was written."""
        first, last = start // _PAGE_BYTES, -(-end // _PAGE_BYTES)
        empty = bytes(_PAGE_BYTES)
        whole = b"".join(self._pages.get(page, empty) for page in range(first, last))
        return whole[start - first * _PAGE_BYTES : end - first * _PAGE_BYTES]
