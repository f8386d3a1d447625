"""Time the three wings beside their peers: `python -m tests.benchmarks.run --help`.

Every peer is a process of its own on the same weights. The driver asks one after the other for one
measurement at a time, round after round, so that whatever else the machine does meets all of them.
It prints one JSON line per peer and case, then a table of ratios to the best other peer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

CASES = {
    "load": "import of ours and load of 125M, without the framework's own import",
    "prefill-1x512": "one pass over 512 tokens, all logits",
    "prefill-8x128": "one pass over 8 rows of 128 tokens, all logits",
    "decode-1": "32 tokens of prompt and 128 new ones, a token",
    "decode-8": "8 rows of 32 tokens of prompt and 128 new ones, a step",
    "beam-4": "32 tokens of prompt and 64 new ones by 4 beams, a step",
    "contrastive": "32 tokens of prompt and 64 new ones by contrastive search over 4, a token",
    "assisted": "32 tokens of prompt and 64 new ones, drafted by 2 of the 12 layers, a token",
    "train-4x256": "forward, backward and AdamW on 4 rows of 256 tokens",
}
PEERS = (
    "opt_torch",
    "opt_torch-medium",
    "opt_torch-bf16",
    "opt_tf",
    "opt_tf-bf16",
    "opt_flax",
    "opt_flax-bf16",
    "keras_hub-tf",
    "keras_hub-jax",
    "transformers",
    "transformers-bf16",
    "ctranslate2",
    "ctranslate2-int8",
)
#: Of transformers 4, which wants other versions of its frameworks: run with `--transformers4`.
OLD_PEERS = ("transformers-tf", "transformers-flax")


class Measured(NamedTuple):
    """One peer's milliseconds in one case, over all rounds."""

    peer: str
    case: str
    milliseconds: list[float]
    facts: dict[str, Any]

    def line(self) -> str:
        """The record of this measurement, JSON in one line."""
        record = {"case": self.case, "peer": self.peer, "ms": round(self.median, 2)}
        every = [round(ms, 2) for ms in self.milliseconds]
        return json.dumps({**record, "all_ms": every, **self.facts})

    @property
    def is_ours(self) -> bool:
        """Whether this is optlm."""
        return self.peer.startswith("opt_")

    @property
    def is_whole(self) -> bool:
        """Whether it computed in float32."""
        return self.facts.get("dtype") == "float32"

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.milliseconds)


class Peer:
    """A process that answers with one measurement for each case that it is asked."""

    def __init__(self, name: str, folder: Path, threads: int, python: str) -> None:
        command = [python, "-m", "tests.benchmarks.peer", name, str(folder), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, case: str) -> dict[str, Any]:
        """One measurement: `{"ms": …}` and facts, or `{"skip": why}`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"skip": "the process ended"}

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(
    pythons: dict[str, str], cases: list[str], rounds: int, folder: Path, threads: int
) -> list[Measured]:
    """All peers, interleaved. The first answer of each warms up and does not count.

    `pythons` has for each peer the interpreter to run it with.
    """
    result: list[Measured] = []
    for case in cases:
        found: dict[str, Measured] = {}
        running = {name: Peer(name, folder, threads, python) for name, python in pythons.items()}
        for turn in range(rounds + (case != "load")):
            for name, python in pythons.items():
                if case == "load" and turn:  # loading is measured in a fresh process
                    running[name].close()
                    running[name] = Peer(name, folder, threads, python)
                answer = running[name].ask(case)
                if "skip" in answer or (case != "load" and turn == 0):
                    continue
                entry = found.setdefault(name, Measured(name, case, [], {}))
                entry.milliseconds.append(answer.pop("ms"))
                entry.facts.update(answer)
        for peer in running.values():
            peer.close()
        for entry in found.values():
            print(entry.line(), flush=True)
        result += found.values()
    return result


def table(measured: list[Measured]) -> str:
    """Markdown: median milliseconds, spread, and the ratio to the best peer that is not ours.

    Float32 is compared with float32, smaller types with the best of the others' smaller types.
    """
    lines = [
        "| case | peer | ms, median (min-max) | x best peer | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(m.case for m in measured):
        rows = sorted((m for m in measured if m.case == case), key=lambda m: m.median)
        for m in rows:
            others = [o.median for o in rows if not o.is_ours and o.is_whole == m.is_whole]
            ratio = f"{m.median / min(others):.2f}" if others else ""
            spread = f"{m.median:.1f} ({min(m.milliseconds):.1f}-{max(m.milliseconds):.1f})"
            lines.append(f"| {case} | {m.peer} | {spread} | {ratio} | {m.facts['peak_mib']} |")
    return "\n".join(lines)


def machine() -> str:
    """The processor and how many of them."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--transformers4",
        metavar="PYTHON",
        help="the interpreter of an environment with transformers 4.53, torch, tensorflow < 2.19, "
        f"tf-keras, flax and jax; adds the peers {' and '.join(OLD_PEERS)}",
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here between runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.peer", "prepare", str(folder), "1"], check=True
        )
        pythons = dict.fromkeys(args.peers, sys.executable)
        if args.transformers4:
            pythons |= dict.fromkeys(OLD_PEERS, args.transformers4)
        measured = measure(pythons, args.cases, args.rounds, folder, args.threads)
    print(f"\n{machine()}, {args.threads} threads, load average {os.getloadavg()[0]:.1f}\n")
    print(table(measured))


if __name__ == "__main__":
    main()
