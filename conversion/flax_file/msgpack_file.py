"""`flax_model.msgpack`: a tree of tensors, read as places in the file.

The file is one msgpack map of maps. A tensor is an extension of type 1: shape, name of the type,
bytes. Larger ones than 2**30 bytes are maps of their own, which hold pieces of the flat tensor.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from conversion.flax_file.params import is_weight
from conversion.views import Joined
from opt_core.checkpoint import (
    CheckpointDamaged,
    StoredFile,
    StoredTensor,
)

CHUNKED = "__msgpack_chunked_array__"
NDARRAY, SCALAR = 1, 3  # Flax's types of extensions that hold an array
_MOST_AXES = 32
_MOST_VALUES = 100_000
_DEEPEST = 64
_LONGEST_KEY = 1024
_BUFFER_BYTES = 4096  # what lies between two tensors, and little of their bytes

DTYPES: dict[str, np.dtype[Any]] = {
    dtype.name: dtype
    for dtype in [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
    + [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.bool_)]
}
# What NumPy calls bfloat16 where it does not know the type.
_VOIDS = {"V2": np.dtype(ml_dtypes.bfloat16), "void16": np.dtype(ml_dtypes.bfloat16)}

# The codes of msgpack whose length follows: how many bytes of length. The rest of a map's code, an
# array's or a short text's is in its low bits.
_MAPS = {0xDE: 2, 0xDF: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_PLAIN = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_COUNTS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}

#: The keys on the way to a value.
Keys = tuple[str, ...]


def is_msgpack(path: Path, start: bytes) -> bool:
    """Whether a file begins with a map whose first key is a text, or is an empty map."""
    if start == b"\x80":
        return True
    lengths = {0xDE: 3, 0xDF: 5}
    is_map = bool(start) and (0x81 <= start[0] <= 0x8F or start[0] in lengths)
    key = start[lengths.get(start[0], 1) :][:1] if is_map else b""
    return bool(key) and (0xA0 <= key[0] <= 0xBF or key[0] in _TEXTS)


def read_msgpack(path: Path) -> dict[str, StoredTensor | Joined]:
    """The tensors of one file, named by their keys joined by `/`, as places in the file.

    Raises CheckpointDamaged for a file that is cut short, contradicts itself or holds anything but
    tensors (beside the parameters of a training it may).
    """
    file = StoredFile.of(path)
    with file.open() as raw:
        handle = io.BufferedReader(raw, _BUFFER_BYTES)  # once forgotten, it would close the file
        found = _Walk(file, handle).tree()
        file.check(raw)
    tensors: dict[str, StoredTensor | Joined] = {}
    for keys, value in _with_chunks_joined(file, found).items():
        name = "/".join(keys)
        if name in tensors:
            raise CheckpointDamaged(f"{file.path} holds {name!r} twice; remove one of them")
        if isinstance(value, StoredTensor | Joined):
            tensors[name] = value
        elif is_weight(name):
            raise CheckpointDamaged(
                f"{file.path}: entry {name!r} is no tensor but a {type(value).__name__}; expected "
                "a tree of parameters, as flax.serialization.to_bytes(params) writes it"
            )
    return tensors


@dataclass
class _Map:
    """A map, or a list, that the walk is in: entries yet to come, and how many there were."""

    keys: Keys
    left: int
    is_list: bool
    done: int = 0


class _Walk:
    """A way through a file that reads what is small and steps over the bytes of tensors."""

    def __init__(self, file: StoredFile, handle: BinaryIO) -> None:
        self.file = file
        self._handle = handle
        self._at = 0

    def tree(self) -> dict[Keys, object]:
        """Every value that is no map by its keys: tensors, counts, None for what nobody needs."""
        found: dict[Keys, object] = {}
        maps = [self._root()]
        seen: set[Keys] = set()
        while maps:
            inner = maps[-1]
            if not inner.left:
                maps.pop()
                continue
            keys = self._next_keys(inner)
            if keys in seen:
                raise self._damaged(f"{'/'.join(keys)!r} is there twice")
            seen.add(keys)
            if len(seen) > _MOST_VALUES or len(maps) > _DEEPEST:
                raise self._damaged("it holds more, or deeper, maps than any model")
            value = self._value(keys)
            if isinstance(value, _Map):
                maps.append(value)
            else:
                found[keys] = value
        if self._at != self.file.size:
            raise self._damaged(f"{self.file.size - self._at} bytes follow the end of its tree")
        return found

    def _root(self) -> _Map:
        code = self._number(1)
        value = self._container(code, ())
        if value is None or value.is_list:
            raise self._damaged(f"it begins with {code:#04x}, expected a map of parameters")
        return value

    def _next_keys(self, inner: _Map) -> Keys:
        inner.left -= 1
        inner.done += 1
        return (*inner.keys, str(inner.done - 1) if inner.is_list else self._text("a key"))

    def _value(self, keys: Keys) -> object:
        code = self._number(1)
        container = self._container(code, keys)
        if container is not None:
            return container
        if code in _EXTENSIONS or code in _FIXED_EXTENSIONS:
            return self._extension(code, keys)
        if code <= 0x7F:
            return code
        if code in _COUNTS:
            return self._number(_COUNTS[code])
        if 0xA0 <= code <= 0xBF:
            self._skip(code & 0x1F)
        elif code in _TEXTS or code in _BYTES:
            self._skip(self._number((_TEXTS | _BYTES)[code]))
        elif code in _PLAIN:
            self._skip(_PLAIN[code])
        elif code < 0xE0:  # what is left above are small negative numbers
            raise self._damaged(f"{'/'.join(keys)!r} has the unknown code {code:#04x}")
        return None

    def _container(self, code: int, keys: Keys) -> _Map | None:
        if 0x80 <= code <= 0x9F:
            left = code & 0x0F
        elif code in _MAPS or code in _ARRAYS:
            left = self._number((_MAPS | _ARRAYS)[code])
        else:
            return None
        return _Map(keys, left, is_list=code in _ARRAYS or 0x90 <= code <= 0x9F)

    def _extension(self, code: int, keys: Keys) -> StoredTensor | None:
        size = _FIXED_EXTENSIONS.get(code) or self._number(_EXTENSIONS[code])
        kind = self._number(1)
        end = self._at + size
        if end > self.file.size:
            raise self._damaged(
                f"{'/'.join(keys)!r} takes {size} bytes, {self.file.size - self._at} are left"
            )
        if kind not in (NDARRAY, SCALAR):
            self._skip(size)
            return None
        name = "/".join(keys)
        shape, dtype, count = self._described(name)
        if math.prod(shape) * dtype.itemsize != count or self._at + count != end:
            raise self._damaged(
                f"{name!r} of shape {shape} and type {dtype} lies in {count} bytes, of which "
                f"{end - self._at} are there"
            )
        tensor = StoredTensor(self.file, self._at, shape, dtype)
        self._skip(count)
        return tensor

    def _described(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Shape, type and number of bytes of a tensor; the bytes follow."""
        outer = self._container(self._number(1), ())
        axes = self._container(self._number(1), ()) if outer else None
        if outer is None or axes is None or not (outer.is_list and axes.is_list):
            raise self._damaged(f"{name!r} is no shape, type and bytes")
        if outer.left != 3 or axes.left > _MOST_AXES:
            raise self._damaged(f"{name!r} has {outer.left} parts, expected 3, or too many axes")
        shape = tuple(self._count(name) for _ in range(axes.left))
        kind = self._text(f"the type of {name!r}")
        dtype = (DTYPES | _VOIDS).get(kind)
        if dtype is None:
            raise self._damaged(
                f"{name!r} has type {kind[:40]!r}, expected one of {', '.join(DTYPES)}"
            )
        code = self._number(1)
        if code not in _BYTES:
            raise self._damaged(f"{name!r} has no bytes but {code:#04x}")
        return shape, dtype, self._number(_BYTES[code])

    def _count(self, name: str) -> int:
        code = self._number(1)
        count = code if code <= 0x7F else self._number(_COUNTS[code]) if code in _COUNTS else -1
        if not 0 <= count <= self.file.size:  # also where another axis is 0
            raise self._damaged(f"{name!r} has an axis that is no length within this file")
        return count

    def _text(self, what: str) -> str:
        code = self._number(1)
        if 0xA0 <= code <= 0xBF:
            size = code & 0x1F
        elif code in _TEXTS:
            size = self._number(_TEXTS[code])
        else:
            raise self._damaged(f"{what} is no text but {code:#04x}")
        if size > _LONGEST_KEY:
            raise self._damaged(f"{what} takes {size} bytes, expected at most {_LONGEST_KEY}")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as fault:
            raise self._damaged(f"{what} is no text: {fault}") from fault

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _take(self, size: int) -> bytes:
        """The next bytes, of which there are few."""
        data = self._handle.read(size)
        self._at += size
        if len(data) != size:
            raise self._damaged("it is cut short")
        return data

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > self.file.size:
            raise self._damaged("it is cut short")
        self._handle.seek(size, os.SEEK_CUR)

    def _damaged(self, fault: str) -> CheckpointDamaged:
        return CheckpointDamaged(
            f"{self.file.path} of {self.file.size} bytes is cut short, damaged or no file of "
            f"Flax's: at byte {self._at}, {fault}"
        )


def _with_chunks_joined(file: StoredFile, found: Mapping[Keys, object]) -> dict[Keys, object]:
    """The values of a file, each tensor that was cut into pieces made one."""
    cut = {keys[:-1]: len(keys) - 1 for keys in found if keys[-1] == CHUNKED}
    if not cut:
        return dict(found)
    whole: dict[Keys, object] = {}
    parts: dict[Keys, dict[Keys, object]] = {keys: {} for keys in cut}
    for keys, value in found.items():
        above = next((keys[:size] for size in set(cut.values()) if keys[:size] in cut), None)
        if above is None:
            whole[keys] = value
        else:
            parts[above][keys[len(above) :]] = value
    for above, inner in parts.items():
        whole[above] = _joined(file, "/".join(above), inner)
    return whole


def _joined(file: StoredFile, name: str, inner: Mapping[Keys, object]) -> StoredTensor | Joined:
    """A tensor of the pieces of its flat values, which need not end where a row does."""
    shape = tuple(n for n in _numbered(inner, "shape") if type(n) is int)
    chunks = [chunk for chunk in _numbered(inner, "chunks") if isinstance(chunk, StoredTensor)]
    kinds = {(chunk.dtype, len(chunk.shape)) for chunk in chunks}
    if len(shape) + len(chunks) + 1 != len(inner) or len(kinds) != 1 or len(shape) > _MOST_AXES:
        raise CheckpointDamaged(f"{file.path}: the pieces of {name!r} are no tensor")
    size = sum(math.prod(chunk.shape) for chunk in chunks)
    if math.prod(shape) != size or not size or len(shape) not in (1, 2) or chunks[0].shape[1:]:
        raise CheckpointDamaged(
            f"{file.path}: {name!r} of shape {shape} is in pieces of {size} values; expected as "
            "many, in one or two axes"
        )
    rows = list(_rows(chunks, shape))
    return rows[0] if len(rows) == 1 else Joined(tuple(rows), 0)


def _numbered(inner: Mapping[Keys, object], what: str) -> Iterator[object]:
    """The values `what`/0, `what`/1 and so on, as long as there are any."""
    number = 0
    while (what, str(number)) in inner:
        yield inner[what, str(number)]
        number += 1


def _rows(chunks: list[StoredTensor], shape: tuple[int, ...]) -> Iterator[StoredTensor | Joined]:
    """Whole rows of each piece, and between them those rows that lie in several pieces."""
    width = math.prod(shape[1:])
    begun: list[StoredTensor] = []
    lacking = 0
    for chunk in chunks:
        at, count = 0, chunk.shape[0]
        if lacking:
            at = min(lacking, count)
            begun.append(_window(chunk, 0, (1, at)))
            lacking -= at
            if not lacking:
                yield Joined(tuple(begun), 1)
                begun = []
        rows = (count - at) // width
        if rows:
            yield _window(chunk, at, (rows, *shape[1:]))
            at += rows * width
        if at < count:
            begun.append(_window(chunk, at, (1, count - at)))
            lacking = width - (count - at)


def _window(chunk: StoredTensor, start: int, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(chunk.file, chunk.offset + start * chunk.dtype.itemsize, shape, chunk.dtype)
