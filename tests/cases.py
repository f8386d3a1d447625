"""Tiny models, weights, batches and masks that tests name or draw, and what they must give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from opt_core import reference
from opt_core.config import ACTIVATIONS, OPTConfig
from opt_core.weights import Head, Kind, table

Arrays = dict[str, NDArray[Any]]

PAD = 1
#: Ids below this one do not occur in drawn texts, except as padding.
FIRST_WORD = 3
HEADS = tuple(Head)

#: Every switch of the architecture, by a name; "post_norm_projected" has the shape of OPT-350M.
SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "pre_norm": {},
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "no_bias": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    "no_final_norm": {"_remove_final_layer_norm": True},
    "untied": {"tie_word_embeddings": False},
    "pruned": {"pruned_heads": {0: [1], 1: [0, 3]}},
    "wide_embedding": {"word_embed_proj_dim": 20, "activation_function": "silu"},
}


def tiny(**changes: Any) -> OPTConfig:
    """A configuration whose model computes in a millisecond."""
    fields: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "ffn_dim": 24,
        "max_position_embeddings": 32,
        "num_attention_heads": 4,
    }
    return OPTConfig(**{**fields, **changes})


def random_weights(
    config: OPTConfig, head: Head, seed: int = 0, *, std: float | None = None
) -> Arrays:
    """Float32 values by canonical name; no norm, bias or padding row is neutral.

    Matrices have the deviation `std`, by default that of the weight table.
    """
    random = np.random.default_rng(seed)
    spread = {Kind.BIAS: 0.2, Kind.NORM_SCALE: 0.3, Kind.NORM_BIAS: 0.2}
    return {
        name: random.normal(row.mean, spread.get(row.kind, std or row.std), row.shape).astype(
            np.float32
        )
        for name, row in table(config, head).items()
    }


class Batch(NamedTuple):
    """A prompt `[B, T]`, and its mask or None."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64] | None

    @property
    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """As the arguments of a call."""
        given = {"input_ids": self.ids}
        return given if self.mask is None else given | {"attention_mask": self.mask}

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Where real tokens are, bool `[B, T]`."""
        return np.ones(self.ids.shape, np.bool_) if self.mask is None else self.mask == 1


def words(rows: int, length: int, seed: int = 0, vocab_size: int = 40) -> NDArray[np.int64]:
    """Random ids `[B, T]` without padding."""
    return np.random.default_rng(seed).integers(FIRST_WORD, vocab_size, (rows, length))


def padded(texts: list[NDArray[np.int64]], side: str) -> Batch:
    """Texts `[T_i]` side by side in one batch, padded on the "left" or the "right"."""
    width = max(map(len, texts))
    ids = np.full((len(texts), width), PAD)
    mask = np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        places = slice(width - len(text), None) if side == "left" else slice(len(text))
        ids[row, places], mask[row, places] = text, 1
    return Batch(ids, mask)


@st.composite
def configs(draw: st.DrawFn) -> OPTConfig:
    """Any combination of switches."""
    return tiny(
        do_layer_norm_before=draw(st.booleans()),
        _remove_final_layer_norm=draw(st.booleans()),
        word_embed_proj_dim=draw(st.sampled_from([16, 12, 20])),
        enable_bias=draw(st.booleans()),
        layer_norm_elementwise_affine=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        activation_function=draw(st.sampled_from(sorted(ACTIVATIONS))),
        pruned_heads=draw(st.sampled_from([{}, {0: [1], 1: [0, 3]}])),
        num_labels=draw(st.sampled_from([1, 3])),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Random ids, whole or with padding on a side or with holes anywhere."""
    rows, length = draw(st.sampled_from([(1, 1), (2, 5), (3, 9)]))
    ids = words(rows, length, draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["none", "ones", "left", "right", "holes"]))
    if kind == "none":
        return Batch(ids, None)
    if kind in ("left", "right"):
        lengths = draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
        batch = padded([row[:count] for row, count in zip(ids, lengths, strict=True)], kind)
        wider = length - batch.ids.shape[1]
        sides = (wider, 0) if kind == "left" else (0, wider)
        ids = np.pad(batch.ids, ((0, 0), sides), constant_values=PAD)
        mask = np.pad(batch.shown.astype(np.int64), ((0, 0), sides))
        return Batch(ids, mask)
    mask = np.ones_like(ids)
    if kind == "holes":
        bits = draw(st.lists(st.integers(0, 1), min_size=ids.size, max_size=ids.size))
        mask = np.array(bits).reshape(ids.shape)
        mask[np.arange(rows), draw(st.integers(0, length - 1))] = 1
    return Batch(ids, mask)


def labels(head: Head, config: OPTConfig, batch: Batch, seed: int = 0) -> Arrays:
    """Arguments that make a head compute its loss; tokens on padding do not count."""
    random = np.random.default_rng(seed)
    rows, length = batch.ids.shape
    if head is Head.CAUSAL_LM:
        # The place before a row's first real token may be padding: its prediction does not count.
        counted = batch.shown & np.pad(batch.shown, ((0, 0), (1, 0)))[:, :-1]
        return {"labels": np.where(counted, batch.ids, -100)}
    if head is Head.SEQUENCE_CLASSIFICATION:
        if config.num_labels == 1:
            return {"labels": random.normal(0, 1, (rows,)).astype(np.float32)}
        return {"labels": random.integers(0, config.num_labels, (rows,))}
    if head is Head.QUESTION_ANSWERING:
        starts, ends = (random.integers(0, length, (rows,)) for _ in range(2))
        return {"start_positions": starts, "end_positions": ends}
    return {}


def vanishing(head: Head, config: OPTConfig) -> set[str]:
    """Weights whose gradients are sums of terms that cancel, wholly or nearly.

    The loss of an answer stays when all places score more, and a bias is added at every place.
    """
    if head is not Head.QUESTION_ANSWERING:
        return set()
    return {name for name in table(config, head) if name.endswith(".bias")}


def expected(head: Head, config: OPTConfig, weights: Mapping[str, Any], **inputs: Any) -> Arrays:
    """What the reference gives: a model's outputs by name, and the output of every module."""
    if head is Head.NONE:
        passed = reference.forward(config, weights, **inputs)
        found: dict[str, Any] = {"last_hidden_state": passed.last_hidden_state}
    else:
        functions: Mapping[Head, Any] = {
            Head.CAUSAL_LM: reference.causal_lm,
            Head.SEQUENCE_CLASSIFICATION: reference.sequence_classification,
            Head.QUESTION_ANSWERING: reference.question_answering,
        }
        found = functions[head](config, weights, **inputs)._asdict()
        passed = found.pop("forward")
    found["hidden_states"], found["attentions"] = passed.hidden_states, passed.attentions
    found["modules"] = passed.modules
    return {name: value for name, value in found.items() if value is not None}
