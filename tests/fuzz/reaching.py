"""Watches what a process reaches for: a file that makes a reader do anything is found out."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

_ROOTS = [
    str(Path(root).resolve())
    for root in (
        tempfile.gettempdir(),
        sys.prefix,
        sys.base_prefix,
        sysconfig.get_path("stdlib"),
        Path(__file__).parents[2],
        "/proc",
        "/dev",
    )
]
#: What no reader of a file does, as Python's audit events call it.
_NEVER = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.putenv", "os.kill"),
    *("socket.connect", "socket.bind", "pickle.find_class"),
)


class Reached(RuntimeError):
    """A reader did what a file made it do."""


def forbid() -> None:
    """From now on, and until the process ends, reaching further than a reader may is an error."""
    cwd = os.getcwd()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _NEVER:
            raise Reached(f"{event} {arguments[:2]!r}")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.normpath(os.path.join(cwd, os.fsdecode(arguments[0])))
            if not any(path == root or path.startswith(root + os.sep) for root in _ROOTS):
                raise Reached(f"open {path!r}")

    sys.addaudithook(hook)
