"""What a conversion will do, before it does anything: matched tensors, pieces, bytes, disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion.formats import Format, format_named, open_checkpoint
from conversion.losses import Losses, watched
from conversion.metaseq import config_of, without_padding
from conversion.pieces import Piece, text
from conversion.pretrained import COMPANIONS, located
from opt_core.checkpoint import Checkpoint, CheckpointNotFound, TensorSource, size_in_bytes
from opt_core.config import CONFIG_FILE, OPTConfig
from opt_core.config.presets import PRESETS
from opt_core.version import __version__
from opt_core.weights import FLOATS, Head, head_in, match, mismatch

#: The types that `--dtype` takes.
DTYPES = {dtype.name: dtype for dtype in FLOATS}
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Plan:
    """A conversion that has been thought through; `conversion.convert` carries it out."""

    checkpoint: Checkpoint
    config: OPTConfig
    head: Head
    target: Path
    format: Format
    #: Canonical name to tensor of the source, in the order of the weight table.
    sources: Mapping[str, TensorSource]
    #: The same as they are written: of the type that is wanted, and looked at on the way.
    tensors: Mapping[str, TensorSource]
    pieces: tuple[Piece, ...]
    losses: Losses
    #: What else a user should know before it starts.
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of tensors to be written."""
        return sum(piece.size for piece in self.pieces)

    @property
    def free(self) -> int:
        """Bytes that are free where the target will be."""
        return shutil.disk_usage(existing(self.target.parent)).free

    @property
    def fingerprint(self) -> str:
        """All that decides what is written: a killed run goes on only under the same one."""
        sources = [
            (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.checkpoint.files
        ]
        pieces = [
            (piece.name, {n: (t.shape, str(t.dtype)) for n, t in piece.tensors.items()})
            for piece in self.pieces
        ]
        told = [__version__, self.format.name, self.config.to_dict(), sources, pieces]
        return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def plan(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    config: OPTConfig | str | os.PathLike[str] | None = None,
    allow: Collection[str] = (),
) -> Plan:
    """Think a conversion through, reading no tensor but small ones; see `conversion.convert`.

    Raises:
        CheckpointMismatch: tensors are missing, unknown or of another shape, and not allowed.
        CheckpointError: the source cannot be used.
        CheckpointNotFound: there are no weights, or no configuration, and none is given.
        HubError: there is no such path, or the repository cannot be read.
        ValueError: an option is unknown, or the format cannot honour it.
    """
    source, target = located(source), Path(os.path.abspath(target))
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    row, losses = format_named(to), Losses(allow)
    limit = _limit(row, max_shard_size)
    checkpoint = open_checkpoint(source)
    beside = source if source.is_dir() else source.parent
    found = _configuration(beside, config, checkpoint)
    checkpoint = without_padding(checkpoint, found)
    head = head_in(found, checkpoint.tensors)
    sources = _matched(checkpoint, found, head, losses)
    tensors = {
        name: watched(name, tensor, DTYPES[dtype] if dtype else tensor.dtype, losses)
        for name, tensor in sources.items()
    }
    types = {str(tensor.dtype) for tensor in tensors.values()}
    written = found.replace(
        architectures=[f"OPT{head.value}"], dtype=max(types, key=lambda t: DTYPES[t].itemsize)
    )
    stored = row.rule.stored(tensors, written, head)
    pieces = [
        *row.pieces(stored, limit, written, head),
        text(CONFIG_FILE, written.to_json_string().encode()),
        *(text(path.name, path.read_bytes()) for path in _companions(beside)),
    ]
    return Plan(
        checkpoint,
        written,
        head,
        target,
        row,
        sources,
        tensors,
        tuple(pieces),
        losses,
        tuple(_notes(checkpoint, sources, tensors, losses)),
    )


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    while not path.is_dir():
        path = path.parent
    return path


def _companions(beside: Path) -> list[Path]:
    return [beside / name for name in COMPANIONS if (beside / name).is_file()]


def _limit(row: Format, size: int | str | None) -> int:
    if size is not None and not row.shards:
        raise ValueError(f"the format {row.name} has no shards: leave out max_shard_size={size!r}")
    return size_in_bytes(DEFAULT_SHARD_SIZE if size is None else size)


def _configuration(
    beside: Path, given: OPTConfig | str | os.PathLike[str] | None, checkpoint: Checkpoint
) -> OPTConfig:
    if isinstance(given, OPTConfig):
        return given
    if isinstance(given, str) and given in PRESETS and not Path(given).exists():
        return OPTConfig.preset(given)
    if given is not None:
        return OPTConfig.from_pretrained(given)
    try:
        return OPTConfig.from_pretrained(beside)
    except CheckpointNotFound as fault:
        fields = config_of(checkpoint.path) if checkpoint.format == "metaseq" else None
        if fields is not None:
            return OPTConfig(**fields)
        raise CheckpointNotFound(
            f"{fault}; --config takes a file, a folder or a published size ({', '.join(PRESETS)})"
        ) from fault


def _matched(
    checkpoint: Checkpoint, config: OPTConfig, head: Head, losses: Losses
) -> dict[str, TensorSource]:
    """The tensors to be written, once nothing speaks against it that is not allowed."""
    matched, where = match(config, head, checkpoint.tensors), str(checkpoint.path)
    if "missing" in losses.allowed:
        for row in matched.missing:
            losses.note("missing", row.name, row.size, "")
        matched.missing.clear()
    if "unknown" in losses.allowed:
        for name, tensor in matched.unexpected.items():
            losses.note("unknown", name, int(np.prod(tensor.shape)), "")
        matched.unexpected.clear()
    fault = mismatch(config, head, matched, where)
    if fault is not None:
        fault.add_note(
            "--config names another configuration; --allow missing and --allow unknown convert "
            "what is there and has a place"
        )
        raise fault
    if matched.head_differs:
        said = f"{where!r}: lm_head.weight differs from the embedding that it is tied to"
        losses.note("tied-head", "lm_head.weight", 1, said)
    return matched.sources


def _notes(
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    tensors: Mapping[str, TensorSource],
    losses: Losses,
) -> list[str]:
    notes = [f"allowed: {loss}: {', '.join(found)}" for loss, found in losses.found.items()]
    types = [(source.dtype, tensors[name].dtype) for name, source in sources.items()]
    rounded = [f"{a} to {b}" for a, b in types if not np.can_cast(a, b, "safe")]
    if rounded:
        kinds = sorted(set(rounded))
        notes.append(f"{len(rounded)} tensors are rounded, from {', '.join(kinds)}")
    if checkpoint.left_out:
        notes.append(
            f"{len(checkpoint.left_out)} entries of the source are no weights (such as an "
            f"optimizer's state) and stay behind: {', '.join(checkpoint.left_out[:5])}"
            + (", …" if len(checkpoint.left_out) > 5 else "")
        )
    return notes
