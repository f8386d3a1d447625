"""The formats of checkpoints: one row each, how it is recognised and who reads it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from conversion.names import canonical_names
from conversion.torch_file import LEGACY_START, ZIP_START, read_torch_file
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
)

INDEX_ENDING = ".index.json"
_START_BYTES = 32


@dataclass(frozen=True)
class Format:
    """One format: the names of its files in a folder, its marks, and its readers."""

    name: str
    file: str
    endings: tuple[str, ...]
    begins: Callable[[bytes], bool]
    read: Callable[[Path], Mapping[str, TensorSource]]
    read_metadata: Callable[[Path], Mapping[str, str]]

    @property
    def index(self) -> str:
        """The name of the index, when the tensors are in shards."""
        return self.file + INDEX_ENDING


# In order of preference. Safetensors first: no pickle, and every byte accounted for.
FORMATS = (
    Format(
        name="safetensors",
        file="model.safetensors",
        endings=(".safetensors",),
        begins=lambda start: start[8:9] == b"{",
        read=read_safetensors,
        read_metadata=read_safetensors_metadata,
    ),
    Format(
        name="torch",
        file="pytorch_model.bin",
        endings=(".bin", ".pt", ".pth"),
        begins=lambda start: start.startswith((ZIP_START, LEGACY_START)),
        read=read_torch_file,
        read_metadata=lambda path: {},
    ),
)

# What to ask the hub for: the first of these that a repository has.
WEIGHT_FILES = [[name] for row in FORMATS for name in (row.file, row.index)]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder, a single file of weights or an index, in any format, reading no tensor.

    Raises CheckpointNotFound when there are no weights; CheckpointDamaged or CheckpointUnsafe for
    files that cannot be used.
    """
    path = Path(path)
    file = _file_of_folder(path) if path.is_dir() else path
    if not file.exists():
        raise CheckpointNotFound(f"there is no checkpoint at {path}: no such file or folder")
    if file.name.endswith(INDEX_ENDING):
        return _open_index(path, file)
    row = _recognised(file)
    return _checkpoint(path, row, (file,), row.read(file), row.read_metadata(file))


def _open_index(path: Path, index: Path) -> Checkpoint:
    shards = [index.parent / name for name in dict.fromkeys(read_weight_map(index).values())]
    rows: list[Format] = []

    def read_shard(shard: Path) -> Mapping[str, TensorSource]:
        rows.append(_recognised(shard))
        return rows[-1].read(shard)

    tensors = read_index(index, read_shard)
    return _checkpoint(path, rows[0], (index, *shards), tensors, read_index_metadata(index))


def _checkpoint(
    path: Path,
    row: Format,
    files: tuple[Path, ...],
    stored: Mapping[str, TensorSource],
    metadata: Mapping[str, str],
) -> Checkpoint:
    names = canonical_names(stored, str(path))
    tensors = {canonical: stored[name] for canonical, name in names.items()}
    return Checkpoint(path, row.name, files, tensors, names, metadata)


def _file_of_folder(folder: Path) -> Path:
    looked_for = [name for names in WEIGHT_FILES for name in names]
    for name in looked_for:
        if (folder / name).exists():
            return folder / name
    there = sorted(entry.name for entry in folder.iterdir())
    listed = ", ".join(there[:20]) + (", …" if len(there) > 20 else "")
    raise CheckpointNotFound(
        f"there are no weights in {folder}: looked for {', '.join(looked_for)}; "
        f"found {listed or 'an empty folder'}"
    )


def _recognised(file: Path) -> Format:
    """The format of a file: by how it begins, else by how its name ends."""
    with file.open("rb") as handle:
        start = handle.read(_START_BYTES)
    for row in FORMATS:
        if row.begins(start):
            return row
    for row in FORMATS:
        if file.name.endswith(row.endings):
            return row
    known = ", ".join(f"{row.name} (*{', *'.join(row.endings)})" for row in FORMATS)
    raise CheckpointError(
        f"{file} is in no format that can be read: it begins with {start[:8]!r}; known are {known}"
    )
