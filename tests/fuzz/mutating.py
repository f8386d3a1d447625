"""Mutates valid files and holds a reader to what it may do with them; the frame of every fuzzer."""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from opt_core.checkpoint import CheckpointError, CheckpointNotFound, TensorSource

#: A checkpoint: file name, with folders, to content.
Files = Mapping[str, bytes]

LONGEST_SECONDS = 2.0
MOST_MEMORY_BYTES = 200 * 2**20
_HANGS_SECONDS = 60
_PATIENCE = 10
_LENGTHS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1]


class Target(NamedTuple):
    """What is fuzzed: valid checkpoints, and how a folder is opened."""

    name: str
    seeds: list[Files]
    open: Callable[[Path], Mapping[str, TensorSource]]
    #: Repairs what a mutation broke before the reader is even reached, such as a checksum.
    mend: Callable[[str, bytes], bytes] | None = None


class Report(NamedTuple):
    """How many inputs were read, or refused with which error, and what went wrong."""

    outcomes: Counter[str]
    failures: list[str]


def fuzz(target: Target, folder: Path, *, count: int, seed: int, first: int = 0) -> Report:
    """Reads `count` mutated checkpoints, made one by one in `folder`."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    start = _most_memory()
    for number in range(first, first + count):
        files = mutated(target, random.Random(f"{seed} {number}"))
        place = folder / "input"
        write(place, files)
        faulthandler.dump_traceback_later(_HANGS_SECONDS, exit=True)
        outcome = _outcome(target, place, files)
        faulthandler.cancel_dump_traceback_later()
        if outcome.startswith("slow"):  # or another process was in the way: once more
            outcome = _outcome(target, place, files)
        if _most_memory() - start > MOST_MEMORY_BYTES:
            outcome, start = "too much memory", _most_memory()
        if outcome != "read" and not outcome.startswith("Checkpoint"):
            failures.append(f"--seed {seed} --first {number}: {outcome}")
            write(folder / f"failed-{number}", files)
        outcomes[outcome.partition(":")[0]] += 1
    return Report(outcomes, failures)


def mutated(target: Target, source: random.Random) -> dict[str, bytes]:
    """One of the seeds with one to four changes, in one file or several."""
    files = dict(source.choice(target.seeds))
    for _ in range(source.choice([1, 1, 1, 2, 3, 4])):
        name = source.choice(sorted(files))
        if len(files) > 1 and source.random() < 0.05:
            _shuffle(files, name, source)
            continue
        other = source.choice(sorted(files.values()))
        files[name] = _mutate(files[name], other, source)
        if target.mend is not None and source.random() < 0.8:
            files[name] = target.mend(name, files[name])
    return files


def write(place: Path, files: Files) -> None:
    """Makes the folder anew with these files."""
    shutil.rmtree(place, ignore_errors=True)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def _shuffle(files: dict[str, bytes], name: str, source: random.Random) -> None:
    """Removes a file, or puts its content in the place of another one."""
    if source.random() < 0.5:
        del files[name]
    else:
        files[source.choice(sorted(files))] = files[name]


def _mutate(data: bytes, other: bytes, source: random.Random) -> bytes:
    content = bytearray(data)
    at = source.randrange(len(content) + 1)
    # Headers are small beside values: most changes go to where something is said.
    if source.random() < 0.5:
        at = min(at, source.randrange(256))
    size = source.choice([1, 2, 4, 8, 32, 256])
    kind = source.randrange(9)
    if kind <= 1 and content:
        content[at % len(content)] ^= 1 << source.randrange(8)
    elif kind == 2 and content:
        content[at % len(content)] = source.randrange(256)
    elif kind in (3, 4):
        width = source.choice([1, 2, 4, 8])
        length = source.choice([*_LENGTHS, len(content), at]) & (1 << 8 * width) - 1
        content[at : at + width] = length.to_bytes(width, source.choice(["big", "little"]))
    elif kind == 5:
        del content[at if source.random() < 0.5 else -min(size, len(content)) or None :]
    elif kind == 6:
        del content[at : at + size]
    elif kind == 7:
        content[at:at] = content[at : at + size] * source.choice([1, 1, 2, 100])
    else:
        begin = source.randrange(len(other) + 1)
        content[at : at + size] = other[begin : begin + size]
    return bytes(content)


def _outcome(target: Target, place: Path, files: Files) -> str:
    begun, computed = time.monotonic(), time.process_time()
    most = 64 * sum(map(len, files.values())) + 2**20
    try:
        for name, tensor in target.open(place).items():
            for values in (tensor.read(), tensor.map()):
                if values.shape != tensor.shape or values.nbytes > most:
                    return f"implausible: {name!r} has shape {values.shape}"
    except (CheckpointError, CheckpointNotFound) as fault:
        if len(str(fault)) > 4000:
            return f"a message of {len(str(fault))} characters"
        outcome = type(fault).__name__
    except Exception:
        return f"foreign error: {traceback.format_exc(limit=-4)}"
    else:
        outcome = "read"
    # Other processes may be in the way, so that time counts little in which this one did nothing.
    seconds = max(time.process_time() - computed, (time.monotonic() - begun) / _PATIENCE)
    return outcome if seconds < LONGEST_SECONDS else f"slow: {seconds:.1f} s"


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(target: Target) -> int:
    """The command: how many inputs, from which seed; 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{target.name}")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--folder", type=Path, help="keep the last input here, and those that failed"
    )
    given = parser.parse_args()
    faulthandler.enable()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        report = fuzz(target, folder, count=given.count, seed=given.seed, first=given.first)
    seconds = time.monotonic() - begun
    print(f"{target.name}: {given.count} inputs in {seconds:.0f} s, seed {given.seed}")
    for outcome, times in report.outcomes.most_common():
        print(f"  {times:8} {outcome}")
    for failure in report.failures[:20]:
        print(failure, file=sys.stderr)
    return 1 if report.failures else 0
