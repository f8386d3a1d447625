"""Mutated checkpoints of metaseq: python -m tests.fuzz.metaseq --count N --seed S."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests import metaseq_files as made
from tests.cases import random_weights
from tests.fuzz.mutating import Files, Target, main
from tests.fuzz.reaching import forbid
from tests.fuzz.torch_file import opened, saved, unpacked

CONFIG = OPTConfig(
    vocab_size=8,
    hidden_size=4,
    num_hidden_layers=1,
    ffn_dim=4,
    max_position_embeddings=2,
    num_attention_heads=2,
    word_embed_proj_dim=2,
)
SETTINGS = argparse.Namespace(decoder_attention_heads=2, activation_fn="relu", dropout=0.1)


def contents() -> list[dict[str, dict[str, Any]]]:
    """Checkpoints, file by file: single ones, parts, and flat shards of one part and of two."""
    state = made.metaseq_state(random_weights(CONFIG, Head.CAUSAL_LM))
    fused = made.fused(state)
    head = {made.HEAD: state["decoder.embed_tokens.weight"].clone()}
    parts = [made.fused(part) for part in made.parts_of(state, 2)]
    tied = made.shards_of(fused, 2, tied=True)
    training = {"last_optimizer_state": {"state": {0: {"step": np.float64(1)}}}}
    return [
        {"restored": {"model": state, "args": SETTINGS}},
        {"consolidated": {"model": fused | head, "cfg": {"model": SETTINGS}, **training}},
        {f"reshard-model_part-{i}": {"model": part} for i, part in enumerate(parts)},
        {f"checkpoint_last-shard{i}": content for i, content in enumerate(tied)},
        {
            f"reshard-model_part-{i}-shard{j}": content
            for i, part in enumerate(parts)
            for j, content in enumerate(made.shards_of(part, 2))
        },
    ]


def seeds() -> list[Files]:
    """Each of them as torch.save writes it, in both layouts, and unpacked."""
    found: list[Files] = []
    for files in contents():
        whole = {f"{name}.pt": saved(content) for name, content in files.items()}
        packed = [unpacked(archive, name) for name, archive in whole.items()]
        legacy = {
            f"{name}.pt": saved(content, _use_new_zipfile_serialization=False)
            for name, content in files.items()
        }
        found += [whole, {key: data for files in packed for key, data in files.items()}, legacy]
    return found


def target() -> Target:
    """The reader of metaseq's checkpoints."""
    return Target("metaseq", seeds(), opened)


if __name__ == "__main__":
    made_of = target()
    forbid()
    sys.exit(main(made_of))
