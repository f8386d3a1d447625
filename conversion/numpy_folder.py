"""A folder with one NumPy file a tensor: ours, and those that alpa and FlexGen keep OPT in.

Files are called `model.decoder.layers.0.fc1.weight.npy`; alpa and FlexGen leave out `.npy`, and
use older names. NumPy has no name for bfloat16: such files say `<V2`, and
`np.load(file).view(ml_dtypes.bfloat16)` gives the values.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion.names import CANONICAL, FrameworkRule, canonical_name
from conversion.pieces import Count, Piece, Tensors, single
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointUnsafe,
    StoredFile,
    StoredTensor,
    blocks,
)

START = b"\x93NUMPY"
_ENDING = ".npy"
_LONGEST_HEADER = 4096
_MOST_AXES = 32
_MOST_BRACKETS = 2  # the dictionary and its shape: Python's parser never goes deep

_KNOWN = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)] + [
    np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.bool_)
]
_DTYPES: dict[str, np.dtype[Any]] = {dtype.str: dtype for dtype in _KNOWN}
_DTYPES["|V2"] = np.dtype(ml_dtypes.bfloat16)

#: Files are called as the canonical tensors in them.
NUMPY = FrameworkRule(
    "torch",
    spell=lambda name, head: name + _ENDING,
    path=lambda name: name.removesuffix(_ENDING),
)


def is_numpy_folder(path: Path) -> bool:
    """Whether a folder holds a NumPy file that is called like a tensor of OPT's decoder."""
    return path.is_dir() and any(
        _is_tensor_of_opt(entry.name) and _begins_right(entry)
        for entry in path.iterdir()
        if entry.is_file()
    )


def read_numpy_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by file name, as places in the files.

    Raises CheckpointDamaged for a file that is not whole, CheckpointUnsafe for one that holds
    Python objects.
    """
    return {
        path.name: read_numpy_file(path)
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and (_is_tensor_of_opt(path.name) or path.suffix == _ENDING or _begins_right(path))
    }


def read_numpy_file(path: Path) -> StoredTensor:
    """The tensor that one `.npy` file is; no value is read, and nothing is unpickled."""
    file = StoredFile.of(path)
    with file.open() as handle:
        start = handle.read(12)
        if start[:6] != START or len(start) != 12 or start[6] not in (1, 2, 3):
            raise CheckpointDamaged(
                f"{path} of {file.size} bytes is cut short, damaged or no NumPy file: it begins "
                f"with {start[:8]!r}, expected {START!r} and a version from 1 to 3"
            )
        at = 10 if start[6] == 1 else 12
        size = int.from_bytes(start[8:at], "little")
        if size > min(file.size - at, _LONGEST_HEADER):
            raise CheckpointDamaged(
                f"{path}: its header is said to take {size} bytes, expected at most "
                f"{_LONGEST_HEADER} within a file of {file.size}"
            )
        handle.seek(at)
        header = handle.read(size)
        file.check(handle)
    return _tensor(file, header, at + size)


def numpy_pieces(tensors: Tensors, limit: int) -> list[Piece]:
    """One file a tensor, whatever its size."""
    pieces = []
    for name, source in tensors.items():
        if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
            raise CheckpointUnsafe(
                f"a tensor is called {name!r}, which is no name for a file of the folder that it "
                "belongs in; nothing was written"
            )
        pieces += single(name, {name: source}, _write)
    return pieces


def _write(path: Path, tensors: Tensors, count: Count) -> None:
    (source,) = tensors.values()
    if source.dtype not in _KNOWN:
        raise CheckpointError(f"{path}: {source.dtype} has no place in a NumPy file")
    header = {"descr": source.dtype.str, "fortran_order": False, "shape": tuple(source.shape)}
    with path.open("xb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for block in blocks(source):
            handle.write(block)
            count(len(block))


def _is_tensor_of_opt(name: str) -> bool:
    canonical = canonical_name(name.removesuffix(_ENDING))
    return canonical is not None and canonical.startswith(CANONICAL)


def _begins_right(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(len(START)) == START


def _tensor(file: StoredFile, header: bytes, offset: int) -> StoredTensor:
    kind, turned, shape = _described(file.path, header)
    dtype = _DTYPES.get(kind)
    if kind.lstrip("|<>=").startswith("O"):
        raise CheckpointUnsafe(
            f"{file.path} holds Python objects, which could run code when they are read and which "
            "no tensor is; nothing was read"
        )
    if dtype is None:
        raise CheckpointDamaged(
            f"{file.path} has type {kind[:40]!r}, expected one of {', '.join(sorted(_DTYPES))}"
        )
    size = math.prod(shape) * dtype.itemsize
    if offset + size != file.size or max(shape, default=0) > file.size:
        raise CheckpointDamaged(
            f"{file.path}: a tensor of shape {shape} and type {dtype} takes {size} bytes, "
            f"found {file.size - offset}"
        )
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape))) if turned else None
    return StoredTensor(file, offset, shape, dtype, strides if len(shape) > 1 else None)


def _described(path: Path, header: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """Type, order and shape that a header names."""
    try:
        if sum(map(header.count, (b"(", b"[", b"{"))) > _MOST_BRACKETS:
            raise ValueError("it is too deep")
        said = ast.literal_eval(header.decode().strip())
        kind, turned, shape = said["descr"], said["fortran_order"], said["shape"]
        if not (isinstance(kind, str) and isinstance(turned, bool) and isinstance(shape, tuple)):
            raise ValueError("it names no type, order and shape")
        if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            raise ValueError("its shape is none")
    # MemoryError and RecursionError are what Python's parser says of too deep a text.
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as fault:
        raise CheckpointDamaged(
            f"{path}: its header {header[:80]!r} describes no tensor ({str(fault)[:200]}); expected"
            " a plain array, as numpy.save writes it"
        ) from fault
    return kind, turned, shape
