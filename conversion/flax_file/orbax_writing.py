"""Orbax's folders of parameters, written with tensorstore alone as StandardCheckpointer does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.flax_file.msgpack_writing import nested
from conversion.flax_file.orbax_folder import STRIPE_BYTES, TREE_FILE, import_tensorstore
from conversion.pieces import Count, Tensors
from opt_core.checkpoint import Array, CheckpointError, TensorSource, size_of

# Names of JAX and NumPy for types that zarr has a code of its own for.
_ZARR_TYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}
_DICT_KEY = 2  # Orbax's number for a key of a dictionary
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


def write_orbax(path: Path, tensors: Tensors, count: Count) -> None:
    """Writes one folder of tensors, named by their keys joined by `/`."""
    ts = import_tensorstore()
    nested(tensors)
    path.mkdir()
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 1},
            "file_io_concurrency": {"limit": 1},
            "file_io_sync": False,  # a piece is synced when it is whole
        }
    )
    chunks = {name: chunk_shape(source) for name, source in tensors.items()}
    # All at once: each commit on its own would leave a file of the database.
    begun = {
        name: ts.open(_spec(path, name, source, chunks[name]), create=True, context=context)
        for name, source in tensors.items()
    }
    stores = {name: opening.result() for name, opening in begun.items()}
    with _Waiting() as waiting:
        for name, source in tensors.items():
            for part in _parts(source.shape, chunks[name]):
                values = source.read(part)
                waiting.write(stores[name] if part is None else stores[name][part], values)
                count(values.nbytes)
    for file, content in _descriptions(tensors).items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(json.dumps(content))


def _parts(shape: tuple[int, ...], chunk: list[int]) -> Iterator[slice | None]:
    """Rows of whole chunks; None for a tensor that is in one chunk."""
    if not chunk or chunk[0] >= shape[0]:
        yield None
        return
    for start in range(0, shape[0], chunk[0]):
        yield slice(start, min(start + chunk[0], shape[0]))


class _Waiting:
    """Values on their way to the disk: those of one file of the database, of bounded size."""

    def __init__(self) -> None:
        self._writes: list[Any] = []
        self._bytes = 0

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, kind: object, fault: BaseException | None, _: object) -> None:
        """Waits in any case: nothing may write into a folder that is being removed."""
        if fault is None:
            self.finish()
        else:
            for write in self._writes:
                write.exception()

    def write(self, store: Any, values: Array) -> None:
        self._writes.append(store.write(values, can_reference_source_data_indefinitely=True))
        self._bytes += values.nbytes
        if self._bytes >= STRIPE_BYTES:
            self.finish()

    def finish(self) -> None:
        for write in self._writes:
            write.result()
        self._writes, self._bytes = [], 0


def chunk_shape(source: TensorSource) -> list[int]:
    """So that whole rows of chunks, and whole columns of them, are of bounded size."""
    size = max(1, size_of(source))
    return [max(1, min(n, STRIPE_BYTES * n // size)) for n in source.shape]


def _spec(path: Path, name: str, source: TensorSource, chunk: list[int]) -> dict[str, Any]:
    kind = _ZARR_TYPES.get(source.dtype.name)
    if kind is None:
        raise CheckpointError(f"{name!r}: {source.dtype} has no place in a tree of parameters")
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{path.absolute()}{os.sep}"},
            "path": name.replace("/", ".") + "/",
            "config": {"max_inline_value_bytes": 1024, "manifest_kind": "single"},
            "assume_config": True,
        },
        "metadata": {
            "zarr_format": 2,
            "shape": list(source.shape),
            "chunks": chunk,
            "dtype": kind,
            "fill_value": None,
            "order": "C",
            "filters": None,
            # Weights hardly get smaller, and plain chunks are read as fast as the disk gives them.
            "compressor": None,
            "dimension_separator": ".",
        },
        "store_data_equal_to_fill_value": True,
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }


def _descriptions(tensors: Tensors) -> Mapping[str, object]:
    """The files in which Orbax looks for the tree."""
    tree = {
        str(tuple(name.split("/"))): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in name.split("/")],
            "value_metadata": {
                # Without a target they are restored to memory, whatever devices there are.
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(source.shape),
            },
        }
        for name, source in tensors.items()
    }
    arrays = [
        {
            "array_metadata": {
                "param_name": name.replace("/", "."),
                "write_shape": list(source.shape),
                "chunk_shape": chunk_shape(source),
                "ext_metadata": None,
            }
        }
        for name, source in tensors.items()
    ]
    return {
        TREE_FILE: {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "array_metadatas/process_0": {"array_metadatas": arrays},
        "_CHECKPOINT_METADATA": {"item_handlers": _HANDLER, "metrics": {}, "custom_metadata": {}},
    }
