"""Orbax's folders of parameters, read through tensorstore: lazily, without JAX or Orbax.

A folder holds a description of the tree (`_METADATA`) and one zarr array a tensor: each in a
folder of its own, or all of them in one OCDBT database, which `manifest.ocdbt` is the root of.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from conversion.flax_file.params import is_weight
from opt_core.checkpoint import Array, CheckpointDamaged, CheckpointUnsafe, StoredFile
from opt_core.checkpoint.reading import parse_json, stored_file

TREE_FILE = "_METADATA"
MANIFEST_FILE = "manifest.ocdbt"
#: Values are kept for a run of reads along either axis, as long as that takes no more than this.
STRIPE_BYTES = 64 * 2**20
_ARRAYS = {"jax.Array", "np.ndarray"}
_MOST_EXPANSION = 2**15  # zstd: four bytes may stand for a block of 128 KiB
_LARGEST_TREE = 8 * 2**20
_SPARE_BYTES = 2**20  # for what a cache keeps beside values: too small by a byte, it keeps none
#: What tensorstore raises for files that it cannot use.
_FAULTS = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, OSError, MemoryError)


@dataclass(frozen=True, eq=False)
class OrbaxTensor:
    """A tensor in an Orbax folder. To read a part is to read every zarr chunk that it touches."""

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    #: A `tensorstore.TensorStore`.
    store: Any
    #: The files that hold it, and perhaps others.
    files: tuple[StoredFile, ...]

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis, in C order in memory of their own.

        Raises CheckpointDamaged if a file has changed since the folder was opened, or if values
        are missing or cannot be decoded.
        """
        window = [slice(0, n) for n in self.shape]
        if part is not None:
            start, stop, _ = part.indices(self.shape[axis])
            window[axis] = slice(start, max(start, stop))
        try:
            values: Array = self.store[tuple(window)].read(order="C").result()
        except _FAULTS as fault:
            self._check()
            raise CheckpointDamaged(
                f"{self.folder}: tensor {self.name!r} cannot be read: {_words(fault)}"
            ) from fault
        self._check()
        return values

    def map(self) -> Array:
        """The values, copied: chunks are compressed."""
        return self.read()

    def _check(self) -> None:
        for file in self.files:
            if stored_file(file.path) != file:
                raise CheckpointDamaged(
                    f"{file.path} has changed since the checkpoint was opened; open it again"
                )


def is_orbax(path: Path) -> bool:
    """Whether a folder holds the description of a tree."""
    return path.is_dir() and (path / TREE_FILE).is_file()


def read_orbax(folder: Path) -> dict[str, OrbaxTensor]:
    """The tensors of a folder, named by their keys joined by `/`; reads no value.

    Raises CheckpointDamaged for a folder that contradicts itself or lacks something,
    CheckpointUnsafe for a name that leads out of it, ImportError without tensorstore.
    """
    ts = import_tensorstore()
    folder = Path(folder)
    tree = _read_tree(folder)
    files = _files(folder)
    opened = _opened(ts, folder, tree, ts.Context(_limits(0)))
    _check_sizes(folder, tree, opened, sum(file.size for file in files[""]))
    # Again, now that it is known how much a run of reads needs at a time.
    room = max((_room(store) for store in opened.values()), default=0)
    opened = _opened(ts, folder, tree, ts.Context(_limits(room + _SPARE_BYTES)))
    found = {}
    for name, store in opened.items():
        shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
        held_by = files.get("" if tree.is_database else tree.arrays[name].place, ())
        found[name] = OrbaxTensor(folder, name, shape, dtype, store, held_by)
    return found


def import_tensorstore() -> ModuleType:
    """The library, which only Orbax's folders need."""
    try:
        import tensorstore
    except ImportError as fault:
        raise ImportError(
            "Orbax's folders need tensorstore, which is not installed: pip install 'optlm[orbax]'"
        ) from fault
    return tensorstore


@dataclass(frozen=True)
class _Described:
    """An array of the tree: the folder or prefix where it lies, and the shape it should have."""

    place: str
    shape: object


@dataclass(frozen=True)
class _Tree:
    arrays: Mapping[str, _Described]
    is_database: bool
    zarr_version: int


def _read_tree(folder: Path) -> _Tree:
    path = folder / TREE_FILE
    file = stored_file(path)
    if file.size > _LARGEST_TREE:
        raise CheckpointDamaged(f"{path} of {file.size} bytes is no description of a tree")
    with file.open() as handle:
        said = parse_json(path, handle.readall(), "it")
    entries = said.get("tree_metadata")
    if not isinstance(entries, dict):
        raise CheckpointDamaged(f"{path} has no tree_metadata, which says what the folder holds")
    arrays: dict[str, _Described] = {}
    places: set[str] = set()
    for entry in entries.values():
        keys, kind, shape = _entry(path, entry)
        name, place = "/".join(keys), ".".join(keys)
        if place in places:
            raise CheckpointDamaged(f"{path} names {name!r} twice")
        places.add(place)
        if kind in _ARRAYS:
            arrays[name] = _Described(place, shape)
        elif is_weight(name):
            raise CheckpointDamaged(f"{path}: {name!r} is no array but of type {str(kind)[:80]!r}")
    return _Tree(arrays, (folder / MANIFEST_FILE).is_file(), 3 if said.get("use_zarr3") else 2)


def _entry(path: Path, entry: object) -> tuple[list[str], object, object]:
    """Keys, type and shape of one value."""
    try:
        keys = [part["key"] for part in entry["key_metadata"]]  # type: ignore[index]
        value = entry["value_metadata"]  # type: ignore[index]
        kind, shape = value["value_type"], value.get("write_shape")
    except (TypeError, LookupError, AttributeError) as fault:
        raise CheckpointDamaged(f"{path}: an entry has no keys or no type: {fault!r}") from fault
    if not keys or not all(isinstance(key, str) and key for key in keys):
        raise CheckpointDamaged(f"{path}: an entry has keys {str(keys)[:200]}, expected texts")
    place = ".".join(keys)
    if any(mark in place for mark in "/\\:\0") or not place.strip("."):
        raise CheckpointUnsafe(
            f"{path}: a tensor is called {place[:200]!r}, which would lead out of the folder; "
            "nothing outside it was opened"
        )
    return keys, kind, shape


def _files(folder: Path) -> dict[str, tuple[StoredFile, ...]]:
    """The files of each folder in this one as they are now, and under "" all of them.

    A pipe or a device could be read for ever, and is refused.
    """
    found: dict[str, list[StoredFile]] = {"": []}
    for above, _, names in os.walk(folder):
        for path in (Path(above) / name for name in names):
            if not path.is_file():
                raise CheckpointUnsafe(f"{path} is no regular file; nothing in it was read")
            file = stored_file(path)
            found[""].append(file)
            found.setdefault(path.relative_to(folder).parts[0], []).append(file)
    return {name: tuple(files) for name, files in found.items()}


def _limits(cache_bytes: int) -> dict[str, dict[str, int]]:
    return {
        "cache_pool": {"total_bytes_limit": cache_bytes},
        "cache_pool#nodes": {"total_bytes_limit": 32 * 2**20},
        "data_copy_concurrency": {"limit": 2},
        "file_io_concurrency": {"limit": 2},
    }


def _opened(ts: ModuleType, folder: Path, tree: _Tree, context: Any) -> dict[str, Any]:
    """A `tensorstore.TensorStore` for every array of the tree."""
    base = {"driver": "file", "path": f"{folder.absolute()}{os.sep}"}
    found = {}
    for name, array in tree.arrays.items():
        place: dict[str, object] = {**base, "path": f"{base['path']}{array.place}/"}
        if tree.is_database:
            place = {"driver": "ocdbt", "base": base, "path": f"{array.place}/"}
            place["cache_pool"] = "cache_pool#nodes"
        spec = {
            "driver": "zarr3" if tree.zarr_version == 3 else "zarr",
            "kvstore": place,
            # Else values that are not there would read as zeros.
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
        }
        try:
            found[name] = ts.open(spec, read=True, open=True, context=context).result()
        except _FAULTS as fault:
            raise CheckpointDamaged(
                f"{folder}: tensor {name!r} cannot be opened: {_words(fault)}"
            ) from fault
    return found


def _check_sizes(folder: Path, tree: _Tree, opened: Mapping[str, Any], size_bytes: int) -> None:
    """CheckpointDamaged if a size is not what the tree says, or more than the files could hold."""
    most = size_bytes * _MOST_EXPANSION
    for name, store in opened.items():
        said = tree.arrays[name].shape
        if said is not None and said != list(store.shape):
            raise CheckpointDamaged(
                f"{folder}: tensor {name!r} has shape {tuple(store.shape)}, but {TREE_FILE} "
                f"says {str(said)[:200]}"
            )
        if store.dtype.numpy_dtype.hasobject:
            raise CheckpointDamaged(f"{folder}: tensor {name!r} has type {store.dtype.name}")
        chunk = math.prod(store.chunk_layout.read_chunk.shape or ())
        if max(math.prod(store.shape), chunk) * store.dtype.numpy_dtype.itemsize > most:
            raise CheckpointDamaged(
                f"{folder}: tensor {name!r} of shape {tuple(store.shape)} in chunks of {chunk} "
                "values is more than its files could hold"
            )


def _room(store: Any) -> int:
    """Bytes of the chunks that reads along one axis share: at least one chunk."""
    chunk: tuple[int, ...] = store.chunk_layout.read_chunk.shape or ()
    size: int = store.dtype.numpy_dtype.itemsize
    stripes = (
        size
        * math.prod(
            min(chunk[axis], n) if axis == along else n for axis, n in enumerate(store.shape)
        )
        for along in range(len(chunk))
    )
    return max(size * math.prod(chunk), min(STRIPE_BYTES, max(stripes, default=0)))


def _words(fault: BaseException) -> str:
    """What tensorstore says, without its specification of the array."""
    return str(fault).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0][:500]
