"""What the names in PyTorch's files stand for: storages, and tensors as views of them."""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from conversion.torch_file.foreign import FOREIGN
from conversion.torch_file.pickles import Maker
from opt_core.checkpoint import CheckpointDamaged, StoredFile, StoredTensor

_MOST_AXES = 64  # as many as NumPy knows

# PyTorch's word for a type in the names of its storage classes.
STORAGE_DTYPES = {
    "Double": np.dtype(np.float64),
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
}
# Types without such a class, for tensors that name their type themselves.
_NEW_DTYPES = [np.dtype(kind) for kind in (np.uint16, np.uint32, np.uint64)]


@dataclass(frozen=True)
class StorageType:
    """A class of storages; `dtype` is None for those of plain bytes."""

    dtype: np.dtype[Any] | None


@dataclass
class Storage:
    """A run of `size` bytes; `offset` in the file is known once the file has been walked."""

    key: str
    dtype: np.dtype[Any]
    size: int
    offset: int | None = None


@dataclass(frozen=True)
class View:
    """A tensor: where it lies in its storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def stored(self, file: StoredFile, name: str) -> StoredTensor:
        """The tensor in `file`; CheckpointDamaged when it is not within its storage.

        No tensor may be larger than the file: with strides of 0 a few bytes could claim any size.
        """
        size = math.prod(self.shape) * self.dtype.itemsize
        steps = zip(self.shape, self.strides, strict=True)
        extent = 1 + sum((n - 1) * step for n, step in steps)
        end = (self.offset + extent) * self.dtype.itemsize if size else 0
        if end > self.storage.size or size > file.size or self.storage.offset is None:
            raise CheckpointDamaged(
                f"{file.path}: tensor {name!r} of shape {self.shape}, strides {self.strides} and "
                f"offset {self.offset} does not lie within its storage {self.storage.key!r} of "
                f"{self.storage.size} bytes"
            )
        if not size:
            return StoredTensor(file, self.storage.offset, self.shape, self.dtype)
        start = self.storage.offset + self.offset * self.dtype.itemsize
        return StoredTensor(file, start, self.shape, self.dtype, self._strides_if_unusual())

    def _strides_if_unusual(self) -> tuple[int, ...] | None:
        """The strides, unless they are those of C order; any will do for an axis of length 1."""
        usual = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        axes = zip(self.shape, self.strides, usual, strict=True)
        strides = [step if n != 1 else other for n, step, other in axes]
        return None if strides == usual else tuple(strides)


class Storages:
    """The storages that a pickle refers to, each one once."""

    def __init__(self) -> None:
        """None so far."""
        self.by_key: dict[str, Storage] = {}

    def refer(self, reference: object) -> Storage:
        """The storage that a persistent id of PyTorch's describes."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise ValueError("it refers to something that is no storage")
        what, kind, key, _location, count, *view = reference
        if what != "storage" or not isinstance(kind, StorageType) or not isinstance(key, str):
            raise ValueError("a storage has no type or no name")
        if not _is_count(count) or any(part is not None for part in view):
            raise ValueError(f"storage {key[:80]!r} has no size, or is a view of another one")
        dtype = kind.dtype or np.dtype(np.uint8)
        found = Storage(key, dtype, count * dtype.itemsize)
        if self.by_key.setdefault(key, found) != found:
            raise ValueError(f"storage {key[:80]!r} is described in two ways")
        return self.by_key[key]


def _tensor(storage: object, offset: object, shape: object, strides: object, *more: object) -> View:
    if len(more) > 3 or (len(more) == 3 and more[2]):
        raise ValueError("a tensor is conjugated, negated or carries unknown attributes")
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return _view(storage, offset, shape, strides, storage.dtype)


def _tensor_with_dtype(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    metadata: object = None,
) -> View:
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype) or metadata:
        raise ValueError("a tensor has no storage, no known type, or unknown attributes")
    return _view(storage, offset, shape, strides, dtype)


def _view(
    storage: Storage, offset: object, shape: object, strides: object, dtype: np.dtype[Any]
) -> View:
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError("a tensor has no shape")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    if not all(map(_is_count, (offset, *shape, *strides))) or not isinstance(offset, int):
        raise ValueError("a tensor has a negative offset, size or stride, or one that is no number")
    return View(storage, offset, shape, strides, dtype)


def _parameter(data: object, _grad: object, _hooks: object) -> View:
    if not isinstance(data, View):
        raise ValueError("a parameter holds no tensor")
    return data


def _size(shape: object) -> tuple[object, ...]:
    if not isinstance(shape, tuple):
        raise ValueError("a size is no tuple")
    return shape


def _ordered_dict() -> dict[object, object]:
    return {}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


NAMES: dict[str, object] = {
    "collections.OrderedDict": Maker(_ordered_dict),
    "torch.Size": Maker(_size),
    "torch._utils._rebuild_tensor": Maker(_tensor),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor),
    "torch._utils._rebuild_tensor_v3": Maker(_tensor_with_dtype),
    "torch._utils._rebuild_parameter": Maker(_parameter),
    "torch.storage.UntypedStorage": StorageType(None),
    "torch.UntypedStorage": StorageType(None),
    **FOREIGN,
}
NAMES |= {f"torch.{word}Storage": StorageType(dtype) for word, dtype in STORAGE_DTYPES.items()}
NAMES |= {f"torch.{dtype.name}": dtype for dtype in [*STORAGE_DTYPES.values(), *_NEW_DTYPES]}
