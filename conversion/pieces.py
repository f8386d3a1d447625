"""What a conversion writes: a target is made of pieces, each a file that is complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opt_core.checkpoint import TensorSource, index_of, shards_of, size_of
from opt_core.checkpoint.saving import INDEX_ENDING

#: Told the bytes of tensors that have just been written, for a progress bar.
Count = Callable[[int], object]
#: Stored name to tensor, in the layout and type of the file.
Tensors = Mapping[str, TensorSource]
#: Writes one file (or folder) of these tensors at a path where nothing is yet.
Write = Callable[[Path, Tensors, Count], None]


@dataclass(frozen=True)
class Piece:
    """One file of a target, or one folder that is a unit.

    `make` creates it at a path of the caller's choice, which must not exist. It may be called in
    any order, or not at all where an earlier run has made the piece. It holds `tensors`.
    """

    name: str
    make: Callable[[Path, Count], None]
    tensors: Tensors = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its tensors; what a file has besides is little."""
        return sum(map(size_of, self.tensors.values()))


def single(name: str, tensors: Tensors, write: Write) -> list[Piece]:
    """A target of one file."""
    return [Piece(name, lambda path, count: write(path, tensors, count), tensors)]


def sharded(name: str, tensors: Tensors, limit: int, write: Write) -> list[Piece]:
    """One file, or, where the tensors take more than `limit` bytes, shards and an index.

    Shards are called as Hugging Face calls them: `model-00001-of-00003.safetensors`. A tensor
    that is larger than the limit has a shard of its own.
    """
    shards = shards_of(tensors, limit)
    if len(shards) == 1:
        return single(name, tensors, write)
    stem, ending = name.split(".", 1)
    named = {
        f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}": shard
        for number, shard in enumerate(shards, 1)
    }
    pieces = [piece for shard, content in named.items() for piece in single(shard, content, write)]
    return [*pieces, text(name + INDEX_ENDING, index_of(named))]


def text(name: str, content: bytes) -> Piece:
    """A small file whose content is at hand."""
    return Piece(name, lambda path, count: _write_bytes(path, content))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
