"""`optlm inspect`: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from math import prod
from pathlib import Path

from rich.table import Table

from opt_core.checkpoint import Checkpoint, CheckpointError, has_nan
from opt_core.cli import sources, terminal
from opt_core.config import OPTConfig
from opt_core.weights import Head, count_parameters, fit, head_in

NAME = "inspect"
DESCRIPTION = """\
what a checkpoint holds, and what is wrong with it

Shows format, files, configuration and every tensor, and compares the tensors with those that the
configuration asks for. Nothing of the tensors is read, unless --check looks for NaN in them.
"""
EPILOG = """\
examples:
  optlm inspect path/to/folder
  optlm inspect facebook/opt-125m --check
  optlm inspect pytorch_model.bin | grep embed

The exit code is 1 if there is a problem.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    sources.add_options(parser)
    parser.add_argument("--check", action="store_true", help="look for NaN in every tensor")


def run(options: argparse.Namespace) -> int:
    """Print what the checkpoint holds; 1 if there is a problem.

    Raises:
        CheckpointError: the weights cannot be opened at all.
    """
    from conversion import open_checkpoint

    source = sources.locate(options)
    checkpoint = open_checkpoint(source)
    notes: list[str] = []
    problems: list[str] = []
    try:
        config: OPTConfig | None = OPTConfig.from_pretrained(source)
    except (ValueError, OSError) as fault:
        config = None
        problems.append(str(fault))
    if config is not None:
        notes, found = _compared(config, checkpoint)
        problems += found
    if options.check:
        problems += _spoiled(checkpoint)
    _print(checkpoint, config, notes, problems)
    return 1 if problems else 0


def _compared(config: OPTConfig, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """What a model of this configuration would say on loading: warnings, and errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(
                config,
                head_in(config, checkpoint.tensors),
                checkpoint.tensors,
                source=str(checkpoint.path),
            )
        except CheckpointError as fault:
            return [], [str(fault)]
    return [str(warning.message) for warning in caught], []


def _spoiled(checkpoint: Checkpoint) -> list[str]:
    tensors = list(checkpoint.tensors.items())
    spoiled = [
        name
        for name, tensor in terminal.tracked("Looking for NaN", tensors)
        if has_nan(tensor.map())
    ]
    return [f"there are NaN values in {', '.join(spoiled)}"] if spoiled else []


def _print(
    checkpoint: Checkpoint, config: OPTConfig | None, notes: list[str], problems: list[str]
) -> None:
    out = terminal.console()
    out.print(terminal.pairs(_summary(checkpoint, config)))
    if config is not None:
        fields = config.to_dict().items()
        out.print("\nConfiguration")
        out.print(terminal.pairs((name, json.dumps(value)) for name, value in fields))
    out.print()
    out.print(_tensor_table(checkpoint))
    out.print()
    for note in notes:
        out.print(f"note: {note}")
    for problem in problems:
        out.print(f"problem: {problem}")
    if not problems:
        out.print("no problems found")


def _summary(checkpoint: Checkpoint, config: OPTConfig | None) -> list[tuple[str, str]]:
    tensors = checkpoint.tensors.values()
    stored = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    types = Counter(str(tensor.dtype) for tensor in tensors)
    rows = [
        ("checkpoint", str(checkpoint.path)),
        ("format", checkpoint.format),
        ("files", ", ".join(map(_file, checkpoint.files))),
        ("tensors", f"{len(tensors)}, {terminal.size(stored)}"),
        ("types", ", ".join(f"{kind} ({count})" for kind, count in types.items())),
    ]
    if config is not None:
        head = head_in(config, checkpoint.tensors)
        tied = head is Head.CAUSAL_LM and config.tie_word_embeddings
        rows += [
            ("model", f"OPT{head.value}"),
            ("parameters", f"{count_parameters(config, head):,}" + (", head tied" * tied)),
        ]
    return rows


def _file(path: Path) -> str:
    return f"{path.name} ({terminal.size(path.stat().st_size)})"


def _tensor_table(checkpoint: Checkpoint) -> Table:
    renamed = any(name != stored for name, stored in checkpoint.original_names.items())
    headings = ["tensor", "type", "shape", "size", *(["stored as"] if renamed else [])]
    rows = []
    for name, tensor in checkpoint.tensors.items():
        size = terminal.size(prod(tensor.shape) * tensor.dtype.itemsize)
        row = [name, str(tensor.dtype), " x ".join(map(str, tensor.shape)), size]
        rows.append([*row, *([checkpoint.original_names[name]] if renamed else [])])
    return terminal.table(headings, rows, right=("size",))
