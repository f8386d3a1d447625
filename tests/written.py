"""Tiny checkpoints written in a format by its own writer, and read back by its reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from conversion.formats import format_named, open_checkpoint
from opt_core.checkpoint import read_safetensors, save
from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import Arrays, random_weights

#: The types that every format holds bit by bit.
DTYPES = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]
dtypes = st.sampled_from(DTYPES)
heads = st.sampled_from(Head)


def weights_of(config: OPTConfig, head: Head, dtype: Any = np.float32) -> Arrays:
    """Random weights by canonical name."""
    return {name: a.astype(dtype) for name, a in random_weights(config, head).items()}


def write(
    folder: Path,
    name: str,
    weights: Mapping[str, NDArray[Any]],
    config: OPTConfig,
    head: Head = Head.CAUSAL_LM,
    *,
    limit: int = 10**12,
) -> int:
    """Writes canonical weights in the format of this name; the bytes that were counted."""
    counted: list[int] = []
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "source", weights)
    sources = read_safetensors(folder / "source/model.safetensors")
    row = format_named(name)
    stored = row.rule.stored({name: sources[name] for name in weights}, config, head)
    for piece in row.pieces(stored, limit, config, head):
        piece.make(folder / piece.name, counted.append)
    (folder / "source/model.safetensors").unlink()
    (folder / "source").rmdir()
    return sum(counted)


def assert_holds(
    folder: Path, name: str, weights: Mapping[str, NDArray[Any]], *, only: bool = True
) -> None:
    """What is read from a folder is these weights, bit by bit, and nothing else if `only`."""
    tensors = open_checkpoint(folder, prefer=[name]).tensors
    if only:
        assert tensors.keys() == weights.keys()
    for key, wanted in weights.items():
        source = tensors[key]
        assert (source.shape, source.dtype) == (wanted.shape, wanted.dtype)
        for values in (source.read(), source.map()):
            assert (values.shape, values.dtype) == (wanted.shape, wanted.dtype)
            assert values.tobytes() == wanted.tobytes()


def assert_reads_by_part(folder: Path, name: str, weights: Mapping[str, NDArray[Any]]) -> None:
    """Parts of every axis of every tensor are those of the whole one."""
    for key, source in open_checkpoint(folder, prefer=[name]).tensors.items():
        wanted = weights[key]
        for axis, n in enumerate(wanted.shape):
            for part in (slice(0, n), slice(1, n - 1), slice(n // 2, n // 2 + 1), slice(2, 2)):
                values = source.read(part, axis=axis)
                cut = np.take(wanted, range(*part.indices(n)), axis)
                assert values.shape == cut.shape
                assert values.tobytes() == cut.tobytes()
                assert values.flags.c_contiguous
                assert values.flags.writeable
