"""Mutated folders of NumPy files: python -m tests.fuzz.numpy --count N --seed S."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from conversion import open_checkpoint
from tests.fuzz.mutating import Files, Target, main

ARRAYS: dict[str, NDArray[Any]] = {
    "model.decoder.embed_tokens.weight.npy": np.arange(36, dtype=np.float32).reshape(9, 4),
    "model.decoder.layers.0.fc1.weight.npy": np.asfortranarray(np.ones((4, 6), np.float16)),
    "model.decoder.layers.0.fc1.bias.npy": np.arange(6).astype(ml_dtypes.bfloat16),
    "decoder.layers.1.fc1.weight": np.ones((2, 3)),
}


def _file(write: Callable[[Any], object]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def seeds() -> list[Files]:
    """As `numpy.save` writes them, in every version of the format, and one of Python objects."""
    plain = {name: _file(lambda out, a=a: np.save(out, a)) for name, a in ARRAYS.items()}  # type: ignore[misc]
    versions = {
        f"decoder.layers.{n}.fc1.bias": _file(
            lambda out, n=n: np.lib.format.write_array(out, np.arange(3.0), (n, 0))  # type: ignore[misc]
        )
        for n in (1, 2, 3)
    }
    objects = np.array([{"a": 1}, None], dtype=object)
    return [
        plain,
        versions,
        {"decoder.x.npy": _file(lambda out: np.save(out, objects, allow_pickle=True))} | versions,
    ]


def target() -> Target:
    """The reader of folders of NumPy files."""
    return Target("numpy", seeds(), lambda place: open_checkpoint(place, prefer=["numpy"]).tensors)


if __name__ == "__main__":
    sys.exit(main(target()))
