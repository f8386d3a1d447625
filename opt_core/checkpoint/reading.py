"""Safetensors files and index files, opened without reading a tensor."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from opt_core.checkpoint.tensors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    StoredFile,
    StoredTensor,
    TensorSource,
)

# In the order of the safetensors library, which sorts a file's tensors by it.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, as places in it.

    Raises CheckpointDamaged, with the library's own words, for a file that is not whole.
    """
    path = Path(path)
    file, header, start = _header(path)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointDamaged(
                f"{path}: tensor {name!r} has type {entry['dtype']}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        offset, dtype = start + entry["data_offsets"][0], DTYPES[entry["dtype"]]
        tensors[name] = StoredTensor(file, offset, tuple(entry["shape"]), dtype)
    return tensors


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of one safetensors file, such as `{"format": "pt"}`."""
    _, header, _ = _header(Path(path))
    return dict(header.get("__metadata__") or {})


def _header(path: Path) -> tuple[StoredFile, dict[str, Any], int]:
    """The file, its header as the library found it sound, and where the tensors begin."""
    file = stored_file(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as fault:
        raise CheckpointDamaged(
            f"{path} of {file.size} bytes is cut short, damaged or no safetensors file: {fault}"
        ) from fault
    with file.open() as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = parse_json(path, handle.read(size), "its header")
        file.check(handle)
    return file, header, 8 + size


def read_index(
    path: Path, read_shard: Callable[[Path], Mapping[str, TensorSource]]
) -> dict[str, TensorSource]:
    """The tensors of all shards that an index names, each shard opened with `read_shard`.

    Raises CheckpointUnsafe for a shard outside the index's folder, CheckpointNotFound for one that
    is not there, CheckpointDamaged when the index and the shards do not say the same.
    """
    path = Path(path)
    shard_of = read_weight_map(path)
    tensors: dict[str, TensorSource] = {}
    found_in: dict[str, str] = {}
    for shard in dict.fromkeys(shard_of.values()):
        if not os.path.isfile(path.parent / shard):
            raise CheckpointNotFound(
                f"{path.parent} lacks the shard {shard}, which {path.name} names; "
                "is the download complete?"
            )
        for name, tensor in read_shard(path.parent / shard).items():
            if name in found_in or shard_of.get(name, shard) != shard:
                other = found_in.get(name, shard_of.get(name))
                raise CheckpointDamaged(
                    f"{path}: tensor {name!r} should be in the shard {other} alone, "
                    f"but is in {shard} as well"
                )
            tensors[name], found_in[name] = tensor, shard
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointDamaged(
                f"{path}: tensor {name!r} should be in the shard {shard}, which lacks it"
            )
    return tensors


def read_weight_map(path: Path) -> dict[str, str]:
    """Which shard an index names for which tensor; every shard is a plain name in the same folder.

    The hub's cache keeps shards as links to files elsewhere, so names are judged, not where they
    lead.
    """
    shard_of = _index(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointDamaged(f"{path} has no weight_map, which says where each tensor is")
    for name, shard in shard_of.items():
        if not isinstance(shard, str):
            raise CheckpointDamaged(f"{path}: the shard of tensor {name!r} is no file name")
        if shard in ("", ".", "..") or any(mark in shard for mark in "/\\:\0"):
            raise CheckpointUnsafe(
                f"{path}: tensor {name!r} is said to be in {shard!r}; a shard is a file in the "
                "checkpoint's own folder. Nothing outside it was opened"
            )
    return shard_of


def read_index_metadata(path: Path) -> dict[str, str]:
    """The `metadata` of an index, such as `total_size`, as text."""
    metadata = _index(path).get("metadata")
    return {k: str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _index(path: Path) -> dict[str, Any]:
    file = stored_file(path)
    with file.open() as handle:
        return parse_json(path, handle.readall(), "it")


def stored_file(path: Path) -> StoredFile:
    """The file at `path`; CheckpointNotFound if there is none."""
    try:
        return StoredFile.of(path)
    except FileNotFoundError:
        raise CheckpointNotFound(f"there is no file {path}") from None


def parse_json(path: Path, data: bytes, what: str) -> dict[str, Any]:
    """A JSON object whose names are all different; `what` of `path` it is, for errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointDamaged(f"{path}: {what} names {twice!r} twice")
        return content

    try:
        content = json.loads(data, object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as fault:
        raise CheckpointDamaged(f"{path}: {what} is no valid JSON: {fault}") from fault
    if not isinstance(content, dict):
        raise CheckpointDamaged(
            f"{path}: {what} holds no JSON object but a {type(content).__name__}"
        )
    return content
