"""A folder that appears whole or not at all: built beside its place, and resumed after a kill.

The pieces of `target` grow in `.target.converting/files`, each under a temporary name until it is
complete and on the disk. When all are there, one rename puts the folder into place. A kill leaves
the complete pieces, and the same conversion goes on behind them; another one starts afresh.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opt_core.checkpoint import write_file

_JOURNAL = "journal.json"
_LOCK = "lock"
_PARTIAL = ".partial"
_COMMIT_BYTES = 256 * 1024 * 1024  # what a kill may cost


class Staging:
    """The unfinished folder of one conversion; `open_staging` makes it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.converting")
        self.files = self.folder / "files"
        self._journal: dict[str, Any] = {}
        self._fresh: dict[str, dict[str, Any]] = {}
        self._fresh_bytes = 0

    @property
    def finished(self) -> dict[str, Any]:
        """The pieces that are complete, and what was noted of each."""
        finished: dict[str, Any] = self._journal["finished"]
        return finished

    def is_placed(self, fingerprint: str, pieces: set[str]) -> bool:
        """Whether an earlier run under the same fingerprint was killed when all was done."""
        self._journal = self._read_journal()
        return (
            self._journal.get("fingerprint") == fingerprint
            and self.finished.keys() == pieces
            and not self.files.exists()
            and all((self.target / name).exists() for name in pieces)
        )

    def begin(self, fingerprint: str) -> None:
        """Keep what an earlier run under the same fingerprint has finished, and nothing else."""
        self._journal = self._read_journal()
        if self._journal.get("fingerprint") != fingerprint:
            self._journal = {"fingerprint": fingerprint, "finished": {}}
            _remove(self.files)
        self.files.mkdir(exist_ok=True)
        for entry in self.files.iterdir():
            if entry.name not in self.finished:
                _remove(entry)
        kept = {name: note for name, note in self.finished.items() if (self.files / name).exists()}
        self._journal["finished"] = kept
        self._write_journal()

    @contextmanager
    def piece(self, name: str, size: int) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Where to create a piece of `size` bytes, and a dictionary for what to note of it."""
        partial = self.files / (name + _PARTIAL)
        note: dict[str, Any] = {}
        try:
            yield partial, note
        except BaseException:
            _remove(partial)
            raise
        self._fresh[name] = note
        self._fresh_bytes += size
        if self._fresh_bytes >= _COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Bring the latest pieces to the disk, give them their names, and enter them as finished.

        Many small ones at once: each would wait for the disk three times.
        """
        for name in self._fresh:
            for path in _files_below(self.files / (name + _PARTIAL)):
                _sync(path)
        for name in self._fresh:
            os.rename(self.files / (name + _PARTIAL), self.files / name)
        _sync(self.files)
        self.finished.update(self._fresh)
        self._write_journal()
        self._fresh, self._fresh_bytes = {}, 0

    def place(self) -> None:
        """Put the folder into place; what is there goes aside first, and then away."""
        self.commit()
        if os.path.lexists(self.target):
            os.rename(self.target, _aside(self.target))
        os.rename(self.files, self.target)
        _sync(self.target.parent)
        _remove(_aside(self.target))

    def rescue(self) -> int:
        """Keep what is complete for the next run, if the disk still takes it; how many pieces."""
        if not self._journal:
            return 0
        try:
            self.commit()
        except OSError:
            return 0
        return len(self.finished)

    def discard(self) -> None:
        """Remove all of it, the journal last: it tells the next run what has been done."""
        _remove(self.files)
        _remove(self.folder / _LOCK)
        _remove(self.folder)

    def _read_journal(self) -> dict[str, Any]:
        try:
            journal = json.loads((self.folder / _JOURNAL).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return journal if isinstance(journal, dict) else {}

    def _write_journal(self) -> None:
        write_file(self.folder / _JOURNAL, json.dumps(self._journal).encode())


def restore(target: Path) -> None:
    """Undo what a kill has left of a replacement: the old folder is back, or gone if replaced."""
    old = _aside(target)
    if os.path.lexists(old) and os.path.lexists(target):
        _remove(old)
    elif os.path.lexists(old):
        os.rename(old, target)


def _aside(target: Path) -> Path:
    """The name under which a replaced folder waits for its successor."""
    return target.with_name(f".{target.name}.replaced")


@contextmanager
def open_staging(target: Path) -> Iterator[Staging]:
    """The staging of a target, which no other process has at the same time.

    Leaves it in place when it holds finished pieces and the conversion fails. Raises OSError when
    another conversion into the same target is running, or the folder cannot be made.
    """
    staging = Staging(target)
    staging.folder.mkdir(parents=True, exist_ok=True)
    with (staging.folder / _LOCK).open("w") as lock:
        _take(lock.fileno(), target)
        try:
            yield staging
        except BaseException as error:
            restore(target)
            kept = staging.rescue()
            if not kept:
                staging.discard()
            else:
                error.add_note(
                    f"{kept} finished files are kept in {staging.folder}: the same command "
                    "goes on from there; remove the folder if it is not wanted"
                )
            raise
        staging.discard()


def _take(lock: int, target: Path) -> None:
    """The system gives a lock back when its process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two runs at once are the user's to avoid
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        message = f"another conversion into {target} is running"
        raise OSError(errno.EBUSY, message) from fault


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for folder, _, names in os.walk(path, topdown=False):
            yield from (Path(folder, name) for name in names)
            yield Path(folder)
    else:
        yield path


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, outlast a loss of power."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
