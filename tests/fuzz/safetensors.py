"""Mutated safetensors files and indexes: python -m tests.fuzz.safetensors --count N --seed S."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from conversion import open_checkpoint
from opt_core.checkpoint import save
from tests.fuzz.msgpack import ARRAYS, WIDE
from tests.fuzz.mutating import Files, Target, main


def seeds(folder: Path) -> list[Files]:
    """Small checkpoints: of one file, of many tensors, of shards with an index."""
    found: list[Files] = []
    for number, (arrays, size) in enumerate([(ARRAYS, "5GB"), (WIDE, "5GB"), (ARRAYS, "0.1KB")]):
        place = folder / str(number)
        save(place, arrays, max_shard_size=size)
        found.append({path.name: path.read_bytes() for path in sorted(place.iterdir())})
    return found


def target() -> Target:
    """The reader of safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        made = seeds(Path(folder))
    return Target("safetensors", made, lambda place: open_checkpoint(place).tensors)


if __name__ == "__main__":
    sys.exit(main(target()))
