"""Mutated `flax_model.msgpack` files: python -m tests.fuzz.msgpack --count N --seed S."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from conversion import open_checkpoint
from conversion.flax_file import msgpack_writing
from opt_core.checkpoint import read_safetensors, save
from tests.fuzz.mutating import Files, Target, main

FILE = "flax_model.msgpack"


ARRAYS: dict[str, NDArray[Any]] = {
    "model/decoder/embed_tokens/embedding": np.arange(36, dtype=np.float32).reshape(9, 4),
    "model/decoder/layers/0/fc1/kernel": np.arange(24, dtype=np.float16).reshape(4, 6),
    "model/decoder/layers/0/fc1/bias": np.arange(6).astype(ml_dtypes.bfloat16),
    "model/decoder/final_layer_norm/scale": np.ones(4, np.float32),
}
WIDE = {f"decoder/layers/{i}/fc1/bias": np.arange(2.0) for i in range(20)}
STATE = {f"params/{name}": array for name, array in ARRAYS.items()}
STATE |= {"opt_state/0/mu/x": np.ones(3), "step": np.array(7)}


def seeds(folder: Path) -> list[Files]:
    """Small files: plain, with tensors in pieces, of a training, empty; with a long map."""
    whole = msgpack_writing._CHUNK_BYTES
    found: list[Files] = []
    try:
        for number, (arrays, limit) in enumerate(
            [(ARRAYS, whole), (ARRAYS, 20), (WIDE, whole), (STATE, whole)]
        ):
            save(folder / str(number), arrays)
            tensors = read_safetensors(folder / str(number) / "model.safetensors")
            msgpack_writing._CHUNK_BYTES = limit
            msgpack_writing.write_msgpack(folder / f"{number}.msgpack", tensors, lambda size: None)
            found.append({FILE: (folder / f"{number}.msgpack").read_bytes()})
    finally:
        msgpack_writing._CHUNK_BYTES = whole
    return [*found, {FILE: b"\x80"}]


def target() -> Target:
    """The reader of msgpack files."""
    with tempfile.TemporaryDirectory() as folder:
        made = seeds(Path(folder))
    return Target("msgpack", made, lambda place: open_checkpoint(place, prefer=["flax"]).tensors)


if __name__ == "__main__":
    sys.exit(main(target()))
