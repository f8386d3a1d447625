"""Time conversions beside `cp` of the same bytes: `python -m tests.benchmarks.conversion --help`.

Every conversion runs in a process of its own, after `cp` of its source and a flush to the disk, so
that both meet the same machine. It prints one JSON line for each, then a table. Checkpoints of
random weights are made shard by shard and removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion import FORMATS, convert
from opt_core.checkpoint import save
from opt_core.config import OPTConfig
from opt_core.weights import table
from tests.benchmarks.peer import name_tokens

#: Shape and type of each checkpoint: the published ones are float16.
SHAPES = {"125m": "float32", "1.3b": "float32", "6.7b": "float16"}
_VALUES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Random:
    """A tensor of random values that is nowhere: each part is made when it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: NDArray[Any]

    def read(self, part: slice | None = None, *, axis: int = 0) -> NDArray[Any]:
        """The values of `part`: the same few million, over and over."""
        shape = list(self.shape)
        if part is not None:
            shape[axis] = len(range(*part.indices(shape[axis])))
        return np.resize(self.values, shape)

    def map(self) -> NDArray[Any]:
        """All values."""
        return self.read()


def make(folder: Path, shape: str, dtype: str) -> None:
    """Write a checkpoint of random weights, never more of it in memory than a block."""
    config, kind = OPTConfig.preset(shape, dtype=dtype), np.dtype(dtype)
    values = np.random.default_rng(0).normal(0, 0.02, _VALUES).astype(kind)
    rows = table(config).items()
    save(folder, {name: Random(row.shape, kind, values) for name, row in rows})
    config.save_pretrained(folder)


def convert_alone(source: Path, target: Path, to: str) -> dict[str, Any]:
    """One conversion in this process: seconds, bytes, and what it took of memory."""
    done = convert(source, target, to=to)
    return {"seconds": done.seconds, "bytes": done.written, "peak": _peak()}


def convert_with_ctranslate2(source: Path, target: Path) -> dict[str, Any]:
    """The peer's converter, which loads the model with transformers."""
    import ctranslate2

    start = time.perf_counter()
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(target))
    return {"seconds": time.perf_counter() - start, "bytes": 0, "peak": _peak()}


def _peak() -> int:
    """The most memory that this process has held, in bytes."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) * 1024


def interpreter() -> int:
    """What Python holds before it has imported anything."""
    code = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return int(done.stdout) * 1024


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp` of a folder, until the bytes are on the disk as ours are."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)
    return time.perf_counter() - start


def measure(folder: Path, shape: str, formats: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """All conversions of one shape, each beside a copy."""
    source, target = folder / shape, folder / "target"
    make(source, shape, SHAPES[shape])
    if "ctranslate2" in formats:
        name_tokens(source)
    for to in formats:
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            copied = copy(source, target)
            shutil.rmtree(target)
            command: list[Any] = [
                sys.executable,
                "-m",
                __spec__.name,
                "--alone",
                source,
                target,
                "--to",
                to,
            ]
            told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            times.append((copied, told["seconds"]))
            shutil.rmtree(target)
        copied, seconds = (min(pair[i] for pair in times) for i in (0, 1))
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        yield {
            "shape": shape,
            "dtype": SHAPES[shape],
            "to": to,
            "bytes": size,
            "seconds": round(seconds, 2),
            "cp_seconds": round(copied, 2),
            "all_seconds": [[round(one, 2) for one in pair] for pair in times],
            "peak_above_interpreter": told["peak"] - interpreter(),
        }
    shutil.rmtree(source)


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    rate = record["bytes"] / record["seconds"] / 1e6
    cells = [
        f"{record['shape']} {record['dtype']}",
        record["to"],
        f"{record['bytes'] / 1e9:.2f} GB",
        f"{record['seconds']:.1f} s",
        f"{rate:.0f} MB/s",
        f"{record['cp_seconds']:.1f} s",
        f"{record['cp_seconds'] / record['seconds']:.0%}",
        f"{record['peak_above_interpreter'] / 1e6:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure what the command line names."""
    names = [row.name for row in FORMATS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["125m"])
    parser.add_argument(
        "--to",
        nargs="+",
        default=names,
        metavar="FORMAT",
        help=f"{', '.join(names)}, or the peer ctranslate2",
    )
    parser.add_argument("--rounds", type=int, default=2, help="the best of this many counts (2)")
    parser.add_argument("--folder", type=Path, help="where there is room: twice the largest shape")
    parser.add_argument("--alone", nargs=2, type=Path, metavar=("SOURCE", "TARGET"))
    options = parser.parse_args()
    if options.alone:
        peer = convert_with_ctranslate2
        source, target = options.alone
        to = options.to[0]
        told = peer(source, target) if to == "ctranslate2" else convert_alone(source, target, to)
        print(json.dumps(told))
        return
    if options.folder is None:
        parser.error("--folder is needed: where the checkpoints are made")
    records = []
    for shape in options.shapes:
        for record in measure(options.folder, shape, options.to, options.rounds):
            records.append(record)
            print(json.dumps(record), flush=True)
    print("\n| checkpoint | to | size | time | rate | cp | of cp | memory |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(map(row, records)))


if __name__ == "__main__":
    main()
