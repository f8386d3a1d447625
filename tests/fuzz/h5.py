"""Mutated HDF5 files of Keras: python -m tests.fuzz.h5 --count N --seed S."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from conversion import format_named, open_checkpoint
from conversion.names import HUGGING_FACE
from opt_core.checkpoint import read_safetensors, save
from opt_core.config import OPTConfig
from opt_core.weights import Head, table
from tests.fuzz.mutating import Files, Target, main

# So small that most of a file is structure.
CONFIG = OPTConfig(
    vocab_size=6,
    hidden_size=4,
    num_hidden_layers=2,
    ffn_dim=4,
    max_position_embeddings=4,
    num_attention_heads=2,
    num_labels=2,
)


def written(folder: Path, to: str, head: Head, dtype: Any, limit: int) -> Files:
    """A checkpoint in one of our formats, as our writer makes it."""
    rows = table(CONFIG, head)
    arrays = {
        name: np.arange(row.size).astype(dtype).reshape(row.shape) for name, row in rows.items()
    }
    save(folder, arrays)
    found = read_safetensors(folder / "model.safetensors")
    tensors = HUGGING_FACE.opened(found, str(folder)).tensors
    row = format_named(to)
    files = {}
    for piece in row.pieces(row.rule.stored(tensors, CONFIG, head), limit, CONFIG, head):
        path = folder / piece.name
        piece.make(path, lambda size: None)
        files[piece.name] = path.read_bytes()
    return files


def trained() -> Files:
    """Weights as Keras keeps them while training, with what is no weight, in two shards."""
    shards = {}
    for number in range(2):
        kept = io.BytesIO()
        with h5py.File(kept, "w") as file:
            layer = file.create_group(f"decoder/layers/decoder_layer_{number}/fc1/vars")
            layer.attrs["name"] = "fc1"
            layer["0"] = np.ones((4, 4), ml_dtypes.bfloat16)
            layer["0"].attrs["dtype"] = "bfloat16"
            layer["1"] = np.ones(4, np.float32)
            file["optimizer/vars/0"] = np.int64(7)
        shards[f"model_0000{number}.weights.h5"] = kept.getvalue()
    index = b"""{"weight_map": {"/decoder/layers/decoder_layer/fc1/vars":
        ["model_00000.weights.h5", "model_00001.weights.h5"]}}"""
    return {"model.weights.json": index, **shards}


def unusual() -> list[Files]:
    """What HDF5 can do and no checkpoint needs: links, chunks, other files, its newer layout."""
    found: list[Files] = []
    for number in range(2):
        kept = io.BytesIO()
        with h5py.File(kept, "w", libver="latest" if number else None) as file:
            group = file.create_group("model")
            group["a"] = np.ones(4, np.float32)
            group.create_dataset("scalar", data=np.float32(1))
            found.append({"tf_model.h5": kept_now(file, kept)})
            group["soft"] = h5py.SoftLink("/model/a")
            found.append({"tf_model.h5": kept_now(file, kept)})
            group["other"] = h5py.ExternalLink("other.h5", "/a")
            group["same"] = group["a"]
            group.create_dataset("chunked", (8,), "f4", chunks=(4,), compression="gzip")
            group.create_dataset("away", (4,), "f4", external=[("other.bin", 0, 16)])
        found.append({"tf_model.h5": kept.getvalue()})
    return found


def kept_now(file: Any, kept: io.BytesIO) -> bytes:
    """What an open file would hold if it were closed now."""
    file.flush()
    return kept.getvalue()


def seeds(folder: Path) -> list[Files]:
    """Small checkpoints of both kinds, single and in shards, in every type."""
    bfloat16, whole = ml_dtypes.bfloat16, 10**9
    rows: list[tuple[str, Head, Any, int]] = [
        ("tf", Head.CAUSAL_LM, np.float32, whole),
        ("tf", Head.NONE, bfloat16, whole),
        ("tf", Head.QUESTION_ANSWERING, np.float16, whole),
        ("tf", Head.CAUSAL_LM, np.float32, 500),
        ("keras", Head.CAUSAL_LM, np.float32, whole),
        ("keras", Head.SEQUENCE_CLASSIFICATION, bfloat16, whole),
        ("keras", Head.NONE, np.float16, whole),
    ]
    found = [written(folder / str(number), *row) for number, row in enumerate(rows)]
    return [*found, trained(), *unusual()]


def target() -> Target:
    """The readers of `tf_model.h5`, of `.weights.h5` and of `.keras`."""
    with tempfile.TemporaryDirectory() as folder:
        made = seeds(Path(folder))
    return Target("h5", made, lambda place: open_checkpoint(place).tensors)


if __name__ == "__main__":
    sys.exit(main(target()))
