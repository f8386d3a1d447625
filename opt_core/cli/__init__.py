"""The command `optlm`: its options, its exit codes, and how it says what went wrong."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opt_core.cli import convert, demo, eval, generate, inspect, verify
from opt_core.version import __version__

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\
examples:
  optlm demo
  optlm generate tiny-opt --prompt "ROMEO:" --temperature 0.8 --seed 1
  optlm generate facebook/opt-125m --prompt "Once upon a time" --max-new-tokens 40
  optlm inspect path/to/folder
  optlm convert facebook/opt-1.3b opt-1.3b-flax --to flax
  optlm eval tiny-opt --text book.txt

A CHECKPOINT is a folder, a file of weights, an index, a repository of the hub such as
facebook/opt-125m, or tiny-opt: the small one that ships with this package.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or with those of the process; returns the exit code.

    Raises:
        SystemExit: wrong usage (2), or `--help` and `--version` (0).
    """
    options = parser().parse_args(arguments)
    try:
        with _warnings_in_one_line():
            return int(options.run(options))
    except KeyboardInterrupt as stop:
        print("\noptlm: interrupted", *_notes(stop), sep="\n", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Who reads has gone. What Python flushes at exit must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"optlm: {_said(error)}", *_notes(error), sep="\n", file=sys.stderr)
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line: every subcommand with its options."""
    whole = argparse.ArgumentParser(
        prog="optlm",
        description="Meta's OPT language models: generate, inspect, convert, evaluate.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"optlm {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for command in (demo, generate, inspect, convert, verify, eval):
        summary, _, _ = command.DESCRIPTION.partition("\n")
        one = commands.add_parser(
            command.NAME,
            help=summary,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(one)
        one.add_argument("--debug", action="store_true", help="show where an error comes from")
        one.set_defaults(run=command.run)
    return whole


def _said(error: Exception) -> str:
    """An error in one message: a foreign kind of error says which one it is."""
    text = str(error).strip()
    if isinstance(error, (ValueError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no more is known'} (--debug shows where)"


def _notes(error: BaseException) -> list[str]:
    """What has been added to an error on its way, such as what to do next."""
    return list(getattr(error, "__notes__", ()))


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def short(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return f"optlm: warning: {message}\n"

    usual = warnings.formatwarning
    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = usual
