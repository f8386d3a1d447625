"""How commands show things: tables for people and for pipes, and progress on terminals only."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

# A pipe has no width: every row stays one line there.
_PIPE_WIDTH = 100_000
_STANDARD_ERROR = 2


def console() -> Console:
    """Standard output: coloured and as wide as the terminal, plain and unwrapped in a pipe."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> Table:
    """A table of texts; the columns named in `right` are aligned there."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        shown.add_column(
            Text(heading), justify="right" if heading in right else "left", overflow="fold"
        )
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def pairs(rows: Iterable[tuple[str, str]]) -> Text:
    """Names and values, one pair a line."""
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0)
    lines = (Text.assemble((f"{name:<{width}}", "bold"), "  ", value) for name, value in listed)
    return Text("\n").join(lines)


def size(count: int) -> str:
    """Bytes as people read them: `4.6 MB`."""
    amount, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 1000 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A progress display on standard error, hidden where that is no terminal."""
    with Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as shown:
        yield shown


def tracked(title: str, items: Sequence[T]) -> Iterator[T]:
    """The items, with a progress bar for how many of them are done."""
    with progress(title) as shown:
        yield from shown.track(items)


@contextmanager
def bytes_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with every number of bytes done, which moves a bar on standard error."""
    with Progress(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as shown:
        task = shown.add_task(title, total=total)
        yield lambda count: shown.advance(task, count)


@contextmanager
def notes_held_back() -> Iterator[None]:
    """Keep what a library writes to standard error past Python, and show it only if it fails.

    TensorFlow tells about the processor on being imported, whatever it is asked.
    """
    sys.stderr.flush()
    kept = os.dup(_STANDARD_ERROR)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), _STANDARD_ERROR)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            os.dup2(kept, _STANDARD_ERROR)
            os.close(kept)
