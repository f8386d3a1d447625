"""Files as `torch.save` writes them, made without PyTorch and block by block."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from conversion.torch_file.values import STORAGE_DTYPES
from conversion.zip_writing import Archive
from opt_core.checkpoint import TensorSource, blocks, size_of

_FOLDER = "archive"  # everything in an archive of PyTorch's lies in one folder
_WORDS = {dtype: word for word, dtype in STORAGE_DTYPES.items()}


def write_torch_file(
    path: Path,
    tensors: Mapping[str, TensorSource],
    count: Callable[[int], object],
    *,
    within: str | None = None,
    beside: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Writes a state dict that `torch.load` reads, also with `weights_only` and `mmap`.

    With `within`, the state dict is the entry of that name in a dict, before those of `beside`:
    dicts, texts, numbers, truth values and None. `count` is told the bytes of tensors that have
    just been written. Raises ValueError for a type that PyTorch has no storage for.
    """
    pickled = b"".join(_pickle(tensors, within, beside))
    with path.open("xb") as handle, Archive(handle) as archive:
        archive.add(f"{_FOLDER}/data.pkl", len(pickled), [pickled])
        archive.add(f"{_FOLDER}/byteorder", 6, [b"little"])
        for number, tensor in enumerate(tensors.values()):
            counted = _counted(blocks(tensor), count)
            archive.add(f"{_FOLDER}/data/{number}", size_of(tensor), counted)
        archive.add(f"{_FOLDER}/version", 2, [b"3\n"])


def _counted(parts: Iterator[memoryview], count: Callable[[int], object]) -> Iterator[memoryview]:
    for part in parts:
        yield part
        count(len(part))


def _pickle(
    tensors: Mapping[str, TensorSource], within: str | None, beside: Mapping[str, object]
) -> Iterator[bytes]:
    yield b"\x80\x02"  # protocol 2, as PyTorch
    if within is not None:
        yield b"}(" + _text(within)
    yield b"ccollections\nOrderedDict\n)R("
    for number, (name, tensor) in enumerate(tensors.items()):
        yield _text(name) + _tensor(number, tensor)
    yield b"u"
    if within is not None:
        yield from (_text(name) + _value(value) for name, value in beside.items())
        yield b"u"
    yield b"."


def _value(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_text(key) + _value(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(value)
    return {None: b"N", True: b"\x88", False: b"\x89"}[value]  # type: ignore[index]


def _tensor(number: int, tensor: TensorSource) -> bytes:
    """A call of `_rebuild_tensor_v2(storage, offset, shape, strides, grad, hooks)`."""
    if tensor.dtype not in _WORDS:
        raise ValueError(
            f"PyTorch's files hold no tensors of type {tensor.dtype}; known are "
            f"{', '.join(map(str, _WORDS))}"
        )
    shape = tensor.shape
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = (
        b"("
        + _text("storage")
        + f"ctorch\n{_WORDS[tensor.dtype]}Storage\n".encode()
        + _text(str(number))
        + _text("cpu")
        + _number(math.prod(shape))
        + b"tQ"
    )
    view = b"K\x00" + _numbers(shape) + _numbers(strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89" + hooks + b"tR"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
