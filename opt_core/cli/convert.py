"""`optlm convert`: a checkpoint written anew in another format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opt_core.cli import sources, terminal

if TYPE_CHECKING:
    from conversion import Conversion, Plan

NAME = "convert"
DESCRIPTION = """\
write a checkpoint anew in another format, with nothing lost

Every format is read and written without its framework, one block of a tensor at a time. First the
plan is shown: formats, tensors, bytes, disk. The target is a folder, which is absent until it is
complete: a conversion that was killed goes on when it is started again. Configuration, tokenizer
and generation options come along. What would be lost stops the conversion, unless --allow names it.
"""
EPILOG = """\
examples:
  optlm convert facebook/opt-1.3b opt-1.3b-flax --to flax
  optlm convert pytorch_model.bin converted --to safetensors --dtype float16 --check
  optlm convert reshard-folder opt-13b --to safetensors --config 13b
  optlm convert path/to/folder other --to tf --dry-run

A repository's size is shown before anything is downloaded; --dry-run stops there.
"""


class _Stop(Exception):
    """What was asked for has been shown."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    from conversion import FORMATS, LOSSES
    from conversion.planning import DEFAULT_SHARD_SIZE, DTYPES

    sources.add_options(parser)
    parser.add_argument("target", metavar="TARGET", help="the folder to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=[row.name for row in FORMATS],
        metavar="FORMAT",
        help=", ".join(row.name for row in FORMATS),
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="round to this type (each tensor keeps its own)"
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help=f"such as 500MB ({DEFAULT_SHARD_SIZE}, where the format has shards)",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="a file, a folder or a published size such as 125m, in place of the one beside SOURCE",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=list(LOSSES),
        metavar="LOSS",
        help="; ".join(f"{name}: {said}" for name, said in LOSSES.items()),
    )
    parser.add_argument(
        "--check", action="store_true", help="read the target back and compare every byte"
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at TARGET")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, and do nothing")


def run(options: argparse.Namespace) -> int:
    """Show the plan, carry it out, and say what was done.

    Raises:
        CheckpointError: the source cannot be used, or would lose something.
        OSError: the target is there, or the disk is full.
    """
    from conversion import COMPANIONS, carry_out, check_target, plan

    out = terminal.console()
    try:
        source = sources.locate(
            options,
            companions=COMPANIONS,
            before=lambda sizes: _show_download(options, sizes),
        )
    except _Stop:
        return 0
    planned = plan(
        source,
        options.target,
        to=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        config=None if options.config is None else sources.named_source(options.config),
        allow=options.allow,
    )
    out.print(terminal.pairs(_planned(planned)))
    if options.dry_run:
        check_target(planned, force=options.force)
        return 0
    sys.stdout.flush()
    total = planned.size * (2 if options.check else 1)
    with terminal.bytes_progress("Converting", total) as count:
        done = carry_out(planned, check=options.check, force=options.force, count=count)
    out.print()
    out.print(terminal.pairs(_done(done)))
    return 0


def _show_download(options: argparse.Namespace, sizes: Mapping[str, int]) -> None:
    largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
    said = f"{terminal.size(sum(sizes.values()))} in {len(sizes)} files: {largest}"
    said += ", …" if len(sizes) > 3 else ""
    out = terminal.console()
    out.print(terminal.pairs([("download", said if sizes else "nothing: it is in the cache")]))
    if options.dry_run and sizes:
        raise _Stop


def _planned(plan: Plan) -> list[tuple[str, str]]:
    source, files = plan.checkpoint, [piece.name for piece in plan.pieces]
    types = sorted({str(tensor.dtype) for tensor in plan.tensors.values()})
    shown = ", ".join(files[:4]) + (f", … ({len(files)} files)" if len(files) > 4 else "")
    return [
        ("from", f"{source.path} ({source.format})"),
        ("to", f"{plan.target} ({plan.format.name})"),
        (
            "model",
            f"OPT{plan.head.value}, {plan.config.num_hidden_layers} layers of width "
            f"{plan.config.hidden_size}",
        ),
        ("tensors", f"{len(plan.tensors)}, {', '.join(types)}"),
        ("bytes", terminal.size(plan.size)),
        ("files", shown),
        ("disk", f"{terminal.size(plan.size)} needed, {terminal.size(plan.free)} free"),
        *(("note", note) for note in plan.notes),
    ]


def _done(done: Conversion) -> list[tuple[str, str]]:
    rate = done.written / max(done.seconds, 1e-9)
    rows = [
        (
            "written",
            f"{terminal.size(done.written)} in {done.seconds:.1f} s, {terminal.size(int(rate))}/s",
        ),
    ]
    if done.checked:
        rows.append(("checked", "every byte read back as it was written"))
    for loss, found in done.plan.losses.found.items():
        rows.append((f"{loss}", ", ".join(f"{name} ({count})" for name, count in found.items())))
    return rows
