"""Which files make a metaseq checkpoint, the tensors that are in them, and one file of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conversion.metaseq.configuration import fields_of, settings_of
from conversion.metaseq.flat import Shard, unflattened
from conversion.metaseq.names import METASEQ
from conversion.metaseq.parts import check_count, merged
from conversion.pieces import Count, Piece, Tensors, single
from conversion.torch_file import (
    ZIP_START,
    read_object,
    tensors_of,
    write_torch_file,
)
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    TensorSource,
)
from opt_core.config import OPTConfig
from opt_core.weights import Head

# As metaseq calls the files of a checkpoint: a stem, the model-parallel part, the shard of it.
_NUMBERED = re.compile(
    r"(?P<stem>.+?)(?:-model_part-(?P<part>[0-9]{1,6}))?(?:-shard(?P<shard>[0-9]{1,6}))?\.pt"
)
#: What single files are called; the first that a folder has is read.
FILES = ("restored*.pt", "consolidated*.pt", "reshard*.pt", "checkpoint_last*.pt")
_PICKLE_START = b"\x80"  # PyTorch's layout before 1.6, whatever the version of its pickles
_MODEL = "model"
_METADATA = "shard_metadata"


class _Numbers(NamedTuple):
    """What the name of a file says; None for a number that it has not."""

    stem: str
    part: int | None
    shard: int | None

    def name(self, part: int, shard: int) -> str:
        """The name of a file of the same kind with these numbers."""
        parts = "" if self.part is None else f"-model_part-{part}"
        return self.stem + parts + ("" if self.shard is None else f"-shard{shard}") + ".pt"


def is_metaseq(path: Path, start: bytes) -> bool:
    """Whether a folder holds parts or shards, or a file of PyTorch's a state dict as `model`."""
    if path.is_dir():
        return any(True for _ in _numbered(path))
    if not start.startswith((ZIP_START, _PICKLE_START)):
        return False
    try:
        _, content = read_object(path)
    except CheckpointError:
        return False  # the reader of PyTorch's files says what is wrong
    return isinstance(content, dict) and isinstance(content.get(_MODEL), dict)


def read_metaseq(path: Path) -> tuple[dict[str, TensorSource], tuple[Path, ...]]:
    """The tensors under metaseq's names as a single file holds them, and all their files.

    `path` is a folder of parts or shards, one of these files, which stands for all of them, or a
    single file. No tensor is read.
    """
    parts = files_of(path)
    places = [str(shards[0]) for shards in parts]
    sources = [unflattened([_opened(file) for file in shards]) for shards in parts]
    numbers = _numbers(parts[0][0])
    if numbers is not None and numbers.part is not None:
        check_count(sources, places)
    return merged(sources, places), tuple(file for shards in parts for file in shards)


def config_of(path: str | Path) -> dict[str, Any] | None:
    """Fields of `OPTConfig` for a checkpoint of metaseq's; None if its files do not tell enough.

    Metaseq writes no config.json, but may keep its settings beside the tensors; they are read as
    plain values. Raises as `read_metaseq` does.
    """
    path = Path(path)
    tensors = METASEQ.opened(read_metaseq(path)[0], str(path)).tensors
    _, content = read_object(files_of(path)[0][0])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return fields_of(content, shapes) if isinstance(content, dict) else None


def metaseq_pieces(tensors: Tensors, limit: int, config: OPTConfig, head: Head) -> list[Piece]:
    """One file: `{"model": state dict, "cfg": …}`, with the settings that no shape tells."""
    beside = {"cfg": {"_name": None, "model": settings_of(config)}, "args": None}

    def write(path: Path, tensors: Tensors, count: Count) -> None:
        write_torch_file(path, tensors, count, within=_MODEL, beside=beside)

    return single("restored.pt", tensors, write)


def files_of(path: Path) -> list[list[Path]]:
    """The files of each part, by the numbers in their names; one part of one for a single file.

    Raises CheckpointNotFound when a number is missing, CheckpointDamaged when one is there twice,
    CheckpointError for a folder with several checkpoints.
    """
    if not path.is_dir() and _numbers(path) is None:
        return [[path]]
    folder = path if path.is_dir() else path.parent
    wanted = None if path.is_dir() else _numbers(path)
    found: dict[tuple[int, int], Path] = {}
    for numbers, file in _numbered(folder):
        wanted = wanted or numbers
        if numbers.stem != wanted.stem:
            if path.is_dir():
                raise CheckpointError(
                    f"{path} holds several checkpoints, {wanted.stem!r} and {numbers.stem!r} among "
                    "them; name one file of the one that is meant, which stands for all its parts"
                )
            continue
        place = numbers.part or 0, numbers.shard or 0
        is_other_kind = wanted.name(0, 0) != numbers.name(0, 0)
        if is_other_kind or found.setdefault(place, file) != file:
            other = found.get(place, path)
            raise CheckpointDamaged(f"{other} and {file} cannot be of one checkpoint: remove one")
    return _single(folder) if wanted is None else _complete(folder, wanted, found)


def _single(folder: Path) -> list[list[Path]]:
    for name in FILES:
        for file in sorted(folder.glob(name)):
            return [[file]]
    raise CheckpointNotFound(f"there are no weights in {folder}: looked for {', '.join(FILES)}")


def _numbers(file: Path) -> _Numbers | None:
    match = _NUMBERED.fullmatch(file.name)
    if match is None or (match["part"] is None and match["shard"] is None):
        return None
    part, shard = (None if match[key] is None else int(match[key]) for key in ("part", "shard"))
    return _Numbers(match["stem"], part, shard)


def _numbered(folder: Path) -> Iterator[tuple[_Numbers, Path]]:
    for file in sorted(folder.iterdir()):
        numbers = _numbers(file)
        if numbers is not None:
            yield numbers, file


def _complete(
    folder: Path, numbers: _Numbers, found: Mapping[tuple[int, int], Path]
) -> list[list[Path]]:
    """The files in the order of their numbers, which must be all from 0 on."""
    parts = []
    for part in range(1 + max(part for part, _ in found)):
        count = 1 + max((shard for other, shard in found if other == part), default=0)
        for shard in range(count):
            if (part, shard) not in found:
                raise CheckpointNotFound(
                    f"{folder} lacks {numbers.name(part, shard)}, though it holds later ones; "
                    "is the download complete?"
                )
        parts.append([found[part, shard] for shard in range(count)])
    return parts


def _opened(file: Path) -> Shard:
    stored, content = read_object(file)
    if not isinstance(content, dict) or not isinstance(content.get(_MODEL), dict):
        raise CheckpointDamaged(
            f"{file} is no checkpoint of metaseq's: expected a dict with a state dict as {_MODEL!r}"
        )
    return Shard(str(file), tensors_of(stored, content[_MODEL]), content.get(_METADATA))
