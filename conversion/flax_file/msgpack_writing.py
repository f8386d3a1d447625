"""`flax_model.msgpack`, written as a stream of the bytes that Flax itself would write."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conversion.flax_file.msgpack_file import CHUNKED, DTYPES, NDARRAY
from conversion.pieces import Count, Tensors
from opt_core.checkpoint import CheckpointError, TensorSource, blocks, size_of

_CHUNK_BYTES = 2**30  # as Flax cuts larger tensors


def write_msgpack(path: Path, tensors: Tensors, count: Count) -> None:
    """Writes one file of tensors, named by their keys joined by `/`."""
    import msgpack

    packer = msgpack.Packer()
    with path.open("xb") as handle:
        for data in _tree(packer, nested(tensors)):
            handle.write(data)
            if isinstance(data, memoryview):
                count(len(data))


def nested(tensors: Tensors) -> dict[str, Any]:
    """The tree whose leaves have these names, keys joined by `/`."""
    tree: dict[str, Any] = {}
    for name, source in tensors.items():
        *above, last = name.split("/")
        inner: Any = tree
        for key in above:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise CheckpointError(f"{name!r} is both a tensor and the name of others")
        inner[last] = source
    return tree


def _tree(packer: Any, value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of a tree, those of tensors as memoryviews; as deep as the names are."""
    if not isinstance(value, dict):
        yield from _tensor(packer, value)
        return
    yield packer.pack_map_header(len(value))
    for key, inner in value.items():
        yield packer.pack(key)
        yield from _tree(packer, inner)


def _tensor(packer: Any, source: TensorSource) -> Iterator[bytes | memoryview]:
    if source.dtype.name not in DTYPES:
        raise CheckpointError(f"{source.dtype} has no place in a file of Flax's")
    size = size_of(source)
    if size <= _CHUNK_BYTES:
        yield _header(packer, source.shape, source.dtype, size)
        yield from blocks(source)
        return
    step = max(1, _CHUNK_BYTES // source.dtype.itemsize) * source.dtype.itemsize
    yield packer.pack_map_header(3)
    yield packer.pack(CHUNKED) + packer.pack(True)
    yield packer.pack("shape") + packer.pack({str(i): n for i, n in enumerate(source.shape)})
    yield packer.pack("chunks") + packer.pack_map_header(-(-size // step))
    written = 0
    for data in _cut(blocks(source), step):
        if written % step == 0:
            length = min(step, size - written)
            yield packer.pack(str(written // step))
            yield _header(packer, (length // source.dtype.itemsize,), source.dtype, length)
        yield data
        written += len(data)


def _cut(parts: Iterable[memoryview], step: int) -> Iterator[memoryview]:
    """The same bytes, none of the parts across a multiple of `step`."""
    room = step
    for part in parts:
        while part:
            head, part = part[:room], part[room:]
            yield head
            room = room - len(head) or step


def _header(packer: Any, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> bytes:
    """What stands before the bytes of a tensor: an extension's code, then how it is to be read."""
    inner: bytes = packer.pack_array_header(3) + packer.pack(list(shape)) + packer.pack(dtype.name)
    inner += _length(size, {1: 0xC4, 2: 0xC5, 4: 0xC6})
    whole = len(inner) + size
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    code = bytes([fixed[whole]]) if whole in fixed else _length(whole, {1: 0xC7, 2: 0xC8, 4: 0xC9})
    return code + struct.pack("b", NDARRAY) + inner


def _length(size: int, codes: dict[int, int]) -> bytes:
    """A code and the length that follows it, in as few bytes as hold it."""
    wide = next(wide for wide in codes if size < 1 << 8 * wide)
    return bytes([codes[wide]]) + size.to_bytes(wide, "big")
