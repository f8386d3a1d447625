"""`optlm verify`: whether two checkpoints are one model, and a page that shows it."""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from opt_core.checkpoint import Checkpoint, write_file
from opt_core.cli import backends, logits, sources, terminal
from opt_core.version import __version__

if TYPE_CHECKING:
    from conversion.pieces import Count
    from conversion.report import Files, Logits
    from conversion.verifying import TensorResult, Verification

NAME = "verify"
DESCRIPTION = """\
whether two checkpoints are one model, in whatever formats

Every tensor of A is compared with that of B, bit by bit, and the configurations field by field. Of
two types they are right when rounding explains all that differs. A copy of the embedding that only
one stores as lm_head, and biases and norms that the configuration switches off, are no difference;
nor are the files beside the weights (tokenizer, generation options), which are listed.
"""
EPILOG = """\
examples:
  optlm verify path/to/folder facebook/opt-125m
  optlm verify pytorch_model.bin model.safetensors
  optlm verify original converted --run --report proof.html
  optlm verify old new --tensors '*.layers.0.*'

--run holds every installed framework to the float64 reference in NumPy, on both checkpoints: it
needs memory for the whole model in double precision.
The exit code is 0 if the two are identical, equal in value or equal after rounding, 1 if they
differ or cannot be compared.
"""
#: So many tensors that differ are listed; a report lists all.
_LISTED = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    sources.add_pair(parser)
    parser.add_argument(
        "--tensors",
        default="*",
        metavar="PATTERN",
        help="compare only tensors of these canonical names, such as '*.layers.0.*'",
    )
    parser.add_argument(
        "--run",
        action="store_true",
        dest="runs",
        help="compare also what each installed framework computes with A and with B",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page to keep, in HTML: what was compared, errors by layer, checksums",
    )
    parser.add_argument("--force", action="store_true", help="replace a FILE that is there")


def run(options: argparse.Namespace) -> int:
    """Print what differs; 1 if anything does that must not.

    Raises:
        CheckpointError: a checkpoint cannot be opened or read.
        ValueError: no tensor has such a name; --run of models without logits; the report's file is
            there, or its folder is not.
    """
    from conversion import open_checkpoint, verify
    from conversion.verifying import Verdict, size_to_verify

    if options.report is not None:
        _check_place(options.report, options.force)
    a, b = (open_checkpoint(path) for path in sources.locate_pair(options))
    subject = logits.Subject.of(a, b) if options.runs else None
    total = size_to_verify(a, b, options.tensors)
    with terminal.bytes_progress("Comparing", total) as count:
        verified = verify(a, b, tensors=options.tensors, count=count)
    _print(verified)
    rows = [] if subject is None else list(subject.compared(verified.verdict))
    _print_logits(rows, options.runs)
    print(verified.sentence)
    if options.report is not None:
        _write_report(options, verified, rows)
    is_same = verified.verdict is not Verdict.DIFFERENT and all(row.holds for row in rows)
    return 0 if is_same else 1


def _check_place(path: Path, replace: bool) -> None:
    """Before the long work: whether the report can be written there."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--report {path}: that is no file in a folder that is there")
    if path.exists() and not replace:
        raise ValueError(f"--report {path} is there already; --force replaces it")


def _print(verified: Verification) -> None:
    out = terminal.console()
    sides = (("A", verified.a), ("B", verified.b))
    out.print(terminal.pairs((letter, _summary(side)) for letter, side in sides))
    out.print()
    kinds = Counter(entry.said for entry in verified.tensors)
    rows = [(said, str(count)) for said, count in kinds.most_common()]
    out.print(terminal.table(["tensors", "count"], rows, right=("count",)))
    out.print()
    worst = verified.differing
    if worst:
        headings = ["tensor", "result", "largest difference", "share", "values", "first at"]
        listed = map(_cells, worst[:_LISTED])
        out.print(terminal.table(headings, listed, right=("largest difference", "share", "values")))
        if len(worst) > _LISTED:
            out.print(f"… and {len(worst) - _LISTED} more")
        out.print()
    notes = list(_notes(verified))
    for note in notes:
        out.print(f"note: {note}")
    if notes:
        out.print()


def _summary(side: Checkpoint) -> str:
    stored = sum(path.stat().st_size for path in side.files if path.is_file())
    count = len(side.tensors)
    return f"{side.path} ({side.format}, {count} tensors, {terminal.size(stored)})"


def _cells(entry: TensorResult) -> list[str]:
    from conversion.report import printable

    found = entry.comparison
    said = entry.said
    if entry.a is not None and entry.b is not None:
        if entry.a.shape != entry.b.shape:
            said += f": {entry.a.shape} and {entry.b.shape}"
        elif entry.a.dtype != entry.b.dtype:
            said += f": {entry.a.dtype} and {entry.b.dtype}"
    said = "; ".join([said, *found.notes])
    if not found.count:
        return [printable(entry.name), said, "", "", "", ""]
    where = str(list(found.first or ()))
    figures = [f"{found.largest:.3g}", f"{found.relative:.1e}", f"{found.count:,}"]
    return [printable(entry.name), said, *figures, where]


def _notes(verified: Verification) -> Iterator[str]:
    from conversion.comparing import Result

    for entry in verified.tensors:
        if entry.result is Result.TIED:
            which = "A" if entry.b is None else "B"
            yield f"{entry.name} is only in {which}, a copy of the embedding: no difference"
    neutral = [entry for entry in verified.tensors if entry.result is Result.NEUTRAL]
    if neutral:
        yield (
            f"{len(neutral)} biases and norms that the configuration switches off are only in one "
            "file, 0 and 1 throughout: no difference"
        )
    if verified.fields is None:
        yield "the configurations were not compared: one has no config.json"
    for field in verified.fields or ():
        a, b = (value if value is not None else "absent" for value in (field.a, field.b))
        weighed = "" if field.is_difference else " (says nothing of the model)"
        yield f"config.json: {field.name} is {a} in A, {b} in B{weighed}"
    for file in verified.files:
        if file.said != "identical":
            yield f"{file.name}: {file.said}"


def _print_logits(rows: list[Logits], runs: bool) -> None:
    if not runs:
        return
    out = terminal.console()
    headings = ["logits", "A to reference", "B to reference", "A to B", ""]
    out.print(terminal.table(headings, map(_logit_cells, rows), right=headings[1:4]))
    if absent := _not_run(runs):
        out.print(f"not installed, and not run: {', '.join(absent)}")
    out.print()


def _logit_cells(row: Logits) -> list[str]:
    figures = ["" if e is None else f"{e:.1e}" for e in (row.a, row.b, row.between)]
    return [row.title, *figures, row.said]


def _write_report(options: argparse.Namespace, verified: Verification, rows: list[Logits]) -> None:
    from conversion.report import page

    sides = verified.a, verified.b
    total = sum(path.stat().st_size for side in sides for path in side.files if path.is_file())
    with terminal.bytes_progress("Checksums of the files", total) as count:
        a, b = (_files(side, count) for side in sides)
    text = page(
        verified,
        given=(options.a, options.b),
        files=(a, b),
        logits=rows,
        not_run=_not_run(options.runs),
        versions=_versions(options.runs),
        when=datetime.now(UTC),
    )
    write_file(options.report, text.encode("utf-8"))
    print(f"report: {options.report}")


def _files(side: Checkpoint, count: Count) -> Files:
    from conversion.verifying import file_checksum

    return [
        (path, path.stat().st_size, file_checksum(path, count))
        for path in side.files
        if path.is_file()
    ]


def _not_run(runs: bool) -> list[str]:
    if not runs:
        return []
    return [wing.title for wing in backends.WINGS.values() if not wing.is_installed]


def _versions(runs: bool) -> Mapping[str, str]:
    """What took part."""
    found = {"optlm": __version__, "Python": platform.python_version()}
    found |= {name: version(name) for name in ("numpy", "ml_dtypes", "safetensors")}
    if runs:
        wings = (backends.WINGS[name] for name in backends.installed())
        found |= {wing.title: wing.version for wing in wings}
    return found
