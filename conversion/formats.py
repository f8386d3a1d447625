"""The formats of checkpoints: one row each, how it is recognised, who reads and writes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from conversion.flax_file import (
    OURS,
    TRANSFORMERS,
    is_msgpack,
    is_orbax,
    read_msgpack,
    read_orbax,
    write_msgpack,
    write_orbax,
)
from conversion.keras_file import (
    HDF5_START,
    KERAS,
    TF,
    is_keras,
    keras_pieces,
    name_in_shard,
    read_keras,
    read_tf,
    tf_pieces,
)
from conversion.metaseq import FILES as METASEQ_FILES
from conversion.metaseq import METASEQ, is_metaseq, metaseq_pieces, read_metaseq
from conversion.names import HUGGING_FACE, Rule
from conversion.numpy_folder import NUMPY, is_numpy_folder, numpy_pieces, read_numpy_folder
from conversion.pieces import Count, Piece, Tensors, sharded, single
from conversion.torch_file import LEGACY_START, ZIP_START, read_torch_file, write_torch_file
from opt_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointNotFound,
    TensorSource,
    read_index,
    read_index_metadata,
    read_safetensors,
    read_safetensors_metadata,
    read_weight_map,
    safetensors_blocks,
)
from opt_core.checkpoint.saving import INDEX_ENDING
from opt_core.config import OPTConfig
from opt_core.weights import Head

_START_BYTES = 32


@dataclass(frozen=True)
class Contents:
    """What a reader finds at a place: tensors under the names of the file."""

    tensors: Mapping[str, TensorSource]
    #: All files that the tensors come from.
    files: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One format: the marks by which it is known, its reader, its writer and its names."""

    #: What `--to` calls it.
    name: str
    title: str
    #: How its files, or the folder that is one checkpoint, are called in a folder: names or
    #: patterns, the first that is there is read.
    files: tuple[str, ...]
    endings: tuple[str, ...]
    #: Whether a path is of this format, by its first bytes (empty for a folder) or what is in it.
    recognises: Callable[[Path, bytes], bool]
    #: Opens one file or folder, reading no tensor.
    read: Callable[[Path], Contents]
    rule: Rule
    #: The pieces of a checkpoint, given stored tensors, the largest size of a shard in bytes, and
    #: what model they are of.
    pieces: Callable[[Tensors, int, OPTConfig, Head], list[Piece]]
    #: The extra that must be installed to read or write it.
    extra: str | None = None
    #: What a shard calls the tensor that the index calls by this name.
    name_in_shard: Callable[[str], str] = field(default=lambda name: name)

    @property
    def shards(self) -> bool:
        """Whether it may be written in shards with an index."""
        return any(name.endswith(INDEX_ENDING) for name in self.files)


def _read_safetensors(path: Path) -> Contents:
    return Contents(read_safetensors(path), (path,), read_safetensors_metadata(path))


def _write_safetensors(path: Path, tensors: Tensors, count: Count) -> None:
    with path.open("xb") as handle:
        handle.writelines(safetensors_blocks(tensors, count))


def _read_orbax(folder: Path) -> Contents:
    tensors = read_orbax(folder)
    return Contents(tensors, tuple(path for path in sorted(folder.rglob("*")) if path.is_file()))


def _read_numpy(folder: Path) -> Contents:
    tensors = read_numpy_folder(folder)
    return Contents(tensors, tuple(folder / name for name in tensors))


def _with_index(file: str) -> tuple[str, str]:
    return file, file + INDEX_ENDING


# In the order of preference in a folder that holds several. Safetensors first: no pickle, and every
# byte accounted for. A file is asked about in the other order, since later rows are more special:
# metaseq's files are PyTorch's, Keras's are HDF5 or zip.
FORMATS = (
    Format(
        name="safetensors",
        title="safetensors, single and sharded",
        files=_with_index("model.safetensors"),
        endings=(".safetensors",),
        recognises=lambda path, start: start[8:9] == b"{",
        read=_read_safetensors,
        rule=HUGGING_FACE,
        pieces=lambda tensors, limit, *_: sharded(
            "model.safetensors", tensors, limit, _write_safetensors
        ),
    ),
    Format(
        name="pytorch",
        title="`pytorch_model.bin`, single and sharded, zip and legacy",
        files=_with_index("pytorch_model.bin"),
        endings=(".bin", ".pt", ".pth"),
        recognises=lambda path, start: start.startswith((ZIP_START, LEGACY_START)),
        read=lambda path: Contents(read_torch_file(path), (path,)),
        rule=HUGGING_FACE,
        pieces=lambda tensors, limit, *_: sharded(
            "pytorch_model.bin", tensors, limit, write_torch_file
        ),
    ),
    Format(
        name="tf",
        title="`tf_model.h5` (transformers' Keras 2 layout), single and sharded",
        files=_with_index("tf_model.h5"),
        endings=(".h5",),
        recognises=lambda path, start: start.startswith(HDF5_START),
        read=lambda path: Contents(read_tf(path), (path,)),
        rule=TF,
        pieces=lambda tensors, limit, *_: tf_pieces(tensors, limit),
        name_in_shard=name_in_shard,
    ),
    Format(
        name="flax",
        title="`flax_model.msgpack`, single and sharded",
        files=_with_index("flax_model.msgpack"),
        endings=(".msgpack",),
        recognises=is_msgpack,
        read=lambda path: Contents(read_msgpack(path), (path,)),
        rule=TRANSFORMERS,
        pieces=lambda tensors, limit, *_: sharded(
            "flax_model.msgpack", tensors, limit, write_msgpack
        ),
    ),
    Format(
        name="keras",
        title="`.keras` and `.weights.h5` of our models (Keras 3)",
        files=("model.keras", "model.weights.h5", "model.weights.json"),
        endings=(".keras", ".weights.h5", ".weights.json"),
        recognises=is_keras,
        read=lambda path: Contents(*read_keras(path)),
        rule=KERAS,
        pieces=lambda tensors, _, config, head: keras_pieces(tensors, config, head),
    ),
    Format(
        name="orbax",
        title="Orbax's folder of a Flax model's parameters, `params`",
        files=("params", "default"),
        endings=(),
        recognises=lambda path, start: is_orbax(path),
        read=_read_orbax,
        rule=OURS,
        pieces=lambda tensors, limit, *_: single("params", tensors, write_orbax),
        extra="orbax",
    ),
    Format(
        name="metaseq",
        title="metaseq originals: single `.pt`, model-parallel parts, flat shards",
        files=METASEQ_FILES,
        endings=(),
        recognises=is_metaseq,
        read=lambda path: Contents(*read_metaseq(path)),
        rule=METASEQ,
        pieces=metaseq_pieces,
    ),
    Format(
        name="numpy",
        title="a folder with one NumPy file a tensor",
        files=(),
        endings=(),
        recognises=lambda path, start: is_numpy_folder(path),
        read=_read_numpy,
        rule=NUMPY,
        pieces=lambda tensors, limit, *_: numpy_pieces(tensors, limit),
    ),
)


def _ordered(prefer: Collection[str]) -> list[Format]:
    return sorted(FORMATS, key=lambda row: row.name not in prefer)


def weight_files(prefer: Collection[str] = ()) -> list[list[str]]:
    """What to ask the hub for: the first of these that a repository has.

    Formats named in `prefer` come first. Folders cannot be asked for.
    """
    rows = [row for row in _ordered(prefer) if row.endings]
    return [[name] for row in rows for name in row.files if "*" not in name]


WEIGHT_FILES = weight_files()


def format_named(name: str) -> Format:
    """The row of a name; ValueError, which lists them all, if there is none."""
    for row in FORMATS:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in FORMATS)
    raise ValueError(f"there is no format {name!r}; known are {known}")


def open_checkpoint(path: str | Path, *, prefer: Collection[str] = ()) -> Checkpoint:
    """Opens a folder, a single file of weights or an index, in any format, reading no tensor.

    Of a folder that holds several formats, those named in `prefer` are looked for first; else the
    order is that of `FORMATS`.

    Raises CheckpointNotFound when there are no weights; CheckpointDamaged or CheckpointUnsafe for
    files that cannot be used.
    """
    path = Path(path)
    row, place = _found(path, prefer)
    if place.name.endswith(INDEX_ENDING):
        row, contents = _read_index(place)
    else:
        contents = row.read(place)
    opened = row.rule.opened(contents.tensors, str(path))
    return Checkpoint(
        path,
        row.name,
        contents.files,
        opened.tensors,
        opened.original_names,
        contents.metadata,
        opened.left_out,
    )


def _read_index(index: Path) -> tuple[Format, Contents]:
    rows: list[Format] = []
    shard_of = read_weight_map(index)

    def read_shard(shard: Path) -> Mapping[str, TensorSource]:
        rows.append(_recognised(shard))
        in_index = {rows[-1].name_in_shard(name): name for name in shard_of}
        found = rows[-1].read(shard).tensors
        return {in_index.get(name, name): tensor for name, tensor in found.items()}

    shards = [index.parent / name for name in dict.fromkeys(shard_of.values())]
    tensors = read_index(index, read_shard)
    return rows[0], Contents(tensors, (index, *shards), read_index_metadata(index))


def _found(path: Path, prefer: Collection[str]) -> tuple[Format, Path]:
    """The format, and the file or folder in which it lies."""
    if not path.exists():
        raise CheckpointNotFound(f"there is no checkpoint at {path}: no such file or folder")
    if path.is_dir():
        return _in_folder(path, prefer)
    if path.name.endswith(INDEX_ENDING):
        return FORMATS[0], path
    return _recognised(path), path


def _in_folder(folder: Path, prefer: Collection[str]) -> tuple[Format, Path]:
    rows = _ordered(prefer)
    for row in rows:
        if row.recognises(folder, b""):
            return row, folder
        for name in row.files:
            for place in sorted(folder.glob(name)):
                return row, place
    there = sorted(entry.name for entry in folder.iterdir())
    listed = ", ".join(there[:20]) + (", …" if len(there) > 20 else "")
    looked_for = ", ".join(name for row in rows for name in row.files)
    raise CheckpointNotFound(
        f"there are no weights in {folder}: looked for {looked_for}; "
        f"found {listed or 'an empty folder'}"
    )


def _recognised(file: Path) -> Format:
    """The format of a file: by how it begins, else by how its name ends."""
    with file.open("rb") as handle:
        start = handle.read(_START_BYTES)
    for row in reversed(FORMATS):
        if row.recognises(file, start):
            return row
    for row in FORMATS:
        if file.name.endswith(row.endings):
            return row
    known = ", ".join(f"{row.name} (*{', *'.join(row.endings)})" for row in FORMATS if row.endings)
    raise CheckpointError(
        f"{file} is in no format that can be read: it begins with {start[:8]!r}; known are {known}"
    )
