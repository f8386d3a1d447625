"""Carrying out a conversion: piece by piece into a folder that appears when it is complete."""

from __future__ import annotations

import errno
import fnmatch
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conversion.formats import FORMATS, open_checkpoint
from conversion.losses import LOSSES, Losses, watched
from conversion.pieces import Count
from conversion.planning import Plan, plan
from conversion.pretrained import COMPANIONS
from conversion.staging import Staging, open_staging, restore
from opt_core.checkpoint import CheckpointDamaged, parts, read_part
from opt_core.config import CONFIG_FILE, OPTConfig

#: What a folder of a checkpoint may hold besides, for it to be replaced with `force`.
_OTHER_FILES = ("README*", "LICENSE*", "NOTICE*", ".gitattributes")
_ROOM_FOR_HEADERS = 1.01


class TargetExists(FileExistsError):
    """There is something where the target should be."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion has done."""

    plan: Plan
    seconds: float
    #: Bytes of tensors written by this run; less than the plan's if an earlier run had begun.
    written: int
    checked: bool


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    config: OPTConfig | str | os.PathLike[str] | None = None,
    allow: Collection[str] = (),
    check: bool = False,
    force: bool = False,
    count: Count = lambda size: None,
) -> Conversion:
    """Write the checkpoint `source` anew as the folder `target`, in the format `to`.

    Tensors pass one block at a time, bit by bit the same unless `dtype` names another type. The
    target is absent until it is complete: a run that was killed can be started again, and goes on
    after the last finished file. Configuration, tokenizer and generation options come along.

    Args:
        source: a folder, a file of weights or an index, in any format that `FORMATS` names, or a
            repository of the hub.
        target: a folder that is not there yet; with `force` a checkpoint that is replaced.
        to: the name of a format.
        dtype: "float32", "float16", "bfloat16" or "float64"; None keeps each tensor's own.
        max_shard_size: bytes, or a text such as "5GB" (the default), where the format has shards.
        config: replaces the configuration beside the weights; also a published size such as "125m".
        allow: the losses (`conversion.LOSSES`) that do not stop the conversion.
        check: read the target back, and compare every byte, before it is put into place.
        force: replace a checkpoint that is at `target`.
        count: is called with every number of bytes of tensors written, and checked.

    Raises:
        LossyConversion: values would be lost, and `allow` does not name how.
        CheckpointMismatch: the source's tensors are not those that its configuration asks for.
        CheckpointDamaged, CheckpointUnsafe, CheckpointNotFound: the source cannot be read.
        HubError: the source is no path, and no repository that can be read.
        TargetExists: there is something at `target`.
        OSError: the disk is full, or another conversion into the target is running.
        ValueError: a bad option; source and target are the same.
    """
    thought_through = plan(
        source,
        target,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        config=config,
        allow=allow,
    )
    return carry_out(thought_through, check=check, force=force, count=count)


def carry_out(
    plan: Plan, *, check: bool = False, force: bool = False, count: Count = lambda size: None
) -> Conversion:
    """Do what a plan says; see `convert`."""
    start = time.monotonic()
    restore(plan.target)
    if Staging(plan.target).is_placed(plan.fingerprint, {piece.name for piece in plan.pieces}):
        with open_staging(plan.target):
            count(plan.size * (1 + check))
            return Conversion(plan, time.monotonic() - start, 0, check)
    check_target(plan, force=force)
    with open_staging(plan.target) as staging, _told_of_full_disks(plan):
        staging.begin(plan.fingerprint)
        left = _left(plan, staging)
        _check_room(plan, left)
        count(plan.size - left)
        _write(plan, staging, count)
        staging.commit()
        if check:
            compare(plan, staging.files, count)
        staging.place()
    return Conversion(plan, time.monotonic() - start, left, check)


def check_target(plan: Plan, *, force: bool) -> None:
    """Raises unless the target may be written: never the source, nor what is no checkpoint."""
    source, target = plan.checkpoint.path.resolve(), plan.target.resolve()
    folder = source if source.is_dir() else source.parent
    if target == folder or target in folder.parents or source in target.parents:
        raise ValueError(
            f"the target {plan.target} and the source {plan.checkpoint.path} lie in one another: "
            "name a folder of its own, so that the source stays as it is"
        )
    if not os.path.lexists(plan.target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise TargetExists(
            f"{plan.target} is there already; --force (force=True) replaces a checkpoint"
        )
    strangers = (
        _strangers(target) if target.is_dir() and not plan.target.is_symlink() else [plan.target]
    )
    if strangers:
        named = ", ".join(str(path.name) for path in strangers[:5])
        raise TargetExists(
            f"{plan.target} is not replaced, since not all of it is a checkpoint: {named}"
        )


def _strangers(folder: Path) -> list[Path]:
    """What in a folder belongs to no checkpoint."""
    ours = [CONFIG_FILE, *COMPANIONS, *_OTHER_FILES]
    for row in FORMATS:
        ours += [*row.files, *(f"*{ending}" for ending in row.endings)]
    return [
        path
        for path in sorted(folder.iterdir())
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ours)
    ]


def _left(plan: Plan, staging: Staging) -> int:
    return sum(piece.size for piece in plan.pieces if piece.name not in staging.finished)


def _check_room(plan: Plan, left: int) -> None:
    needed = int(left * _ROOM_FOR_HEADERS)
    if needed > plan.free:
        raise OSError(
            errno.ENOSPC,
            f"it needs {needed:,} bytes, and {plan.free:,} are free there; nothing was written",
        )


@contextmanager
def _told_of_full_disks(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"there is too little room for {plan.target}: {fault}; the source is as it was"
        raise OSError(fault.errno, message) from fault


def _write(plan: Plan, staging: Staging, count: Count) -> None:
    for piece in plan.pieces:
        if piece.name in staging.finished:
            _recall(plan.losses, staging.finished[piece.name])
            continue
        with staging.piece(piece.name, piece.size) as (path, note):
            before = {loss: dict(found) for loss, found in plan.losses.found.items()}
            piece.make(path, count)
            note.update(_since(before, plan.losses))


def _since(before: dict[str, dict[str, int]], losses: Losses) -> dict[str, dict[str, int]]:
    """The losses found since `before`."""
    return {
        loss: {name: n for name, n in found.items() if name not in before.get(loss, {})}
        for loss, found in losses.found.items()
    }


def _recall(losses: Losses, note: dict[str, dict[str, int]]) -> None:
    """Enter what an earlier run has found; stops if it is no longer allowed."""
    for loss, found in note.items():
        for name, number in found.items():
            losses.note(loss, name, number, f"tensor {name!r}, converted by an earlier run")


def compare(plan: Plan, folder: Path, count: Count) -> None:
    """Raises CheckpointDamaged unless the files in `folder` hold the plan's tensors, bit by bit."""
    written = open_checkpoint(folder).tensors
    told = Losses(LOSSES)  # what is lost was said when it was written
    for name, source in plan.sources.items():
        wanted = watched(name, source, plan.tensors[name].dtype, told)
        found = written.get(name)
        if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointDamaged(f"tensor {name!r} was not written as it should have been")
        for part in parts(wanted, found):
            block = read_part(wanted, part).tobytes()
            if read_part(found, part).tobytes() != block:
                raise CheckpointDamaged(
                    f"tensor {name!r} does not read back as it was written: is the disk sound?"
                )
            count(len(block))
