"""The weight table: every tensor of every OPT model, with what each framework must know of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig

#: Axes of a stored `[out, in]` matrix; an embedding is `[rows, width]`.
OUT, INTO = 0, 1
FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
EMBEDDING_NAME = "model.decoder.embed_tokens.weight"
LM_HEAD_NAME = "lm_head.weight"


class Head(Enum):
    """What sits on the decoder; the value is the word in a class name."""

    NONE = "Model"
    CAUSAL_LM = "ForCausalLM"
    SEQUENCE_CLASSIFICATION = "ForSequenceClassification"
    QUESTION_ANSWERING = "ForQuestionAnswering"


class Kind(Enum):
    """What a tensor is to a framework: its leaf name and layout follow."""

    EMBEDDING = "embedding"
    MATRIX = "matrix"
    BIAS = "bias"
    NORM_SCALE = "norm scale"
    NORM_BIAS = "norm bias"


#: The last part of a parameter's path in each framework. Torch's is the checkpoint's.
LEAVES: Mapping[Kind, Mapping[str, str]] = {
    Kind.EMBEDDING: {"torch": "weight", "keras": "embeddings", "flax": "embedding"},
    Kind.MATRIX: {"torch": "weight", "keras": "kernel", "flax": "kernel"},
    Kind.BIAS: {"torch": "bias", "keras": "bias", "flax": "bias"},
    Kind.NORM_SCALE: {"torch": "weight", "keras": "gamma", "flax": "scale"},
    Kind.NORM_BIAS: {"torch": "bias", "keras": "beta", "flax": "bias"},
}


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    `shape` and `split` (the axis that tensor parallelism cuts, or None) are for the stored layout,
    matrices as `[out, in]`. Fresh values are normal with standard deviation `std` around `mean`;
    `zero_row` is a row of zeros in them.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    split: int | None = None
    mean: float = 0.0
    std: float = 0.0
    zero_row: int | None = None

    @property
    def size(self) -> int:
        """The number of values."""
        return prod(self.shape)

    def path(self, framework: str) -> str:
        """The parameter's dotted path in a framework ("torch", "keras" or "flax")."""
        return f"{self.name.rpartition('.')[0]}.{LEAVES[self.kind][framework]}"

    def transposed(self, framework: str) -> bool:
        """Whether the framework keeps this tensor as `[in, out]`."""
        return self.kind is Kind.MATRIX and framework != "torch"


def initial(weight: Weight, random: np.random.Generator) -> NDArray[np.float32]:
    """Fresh values for one row of the table, float32, in the stored layout."""
    values = np.full(weight.shape, weight.mean, np.float32)
    if weight.std:
        values += random.standard_normal(weight.shape, np.float32) * np.float32(weight.std)
    if weight.zero_row is not None:
        values[weight.zero_row] = 0
    return values


def table(config: OPTConfig, head: Head = Head.CAUSAL_LM) -> dict[str, Weight]:
    """Every tensor that a model of this configuration and head has, by its canonical name.

    Canonical names are those of Hugging Face's `OPTForCausalLM`; a bare `OPTModel` writes them
    without the leading `model.`. A tied language-model head is no tensor of its own.
    """
    rows = [*_decoder(config), *_head(config, head)]
    return {row.name: row for row in rows}


def _matrix(config: OPTConfig, path: str, out: int, into: int, split: int | None) -> Weight:
    return Weight(f"{path}.weight", Kind.MATRIX, (out, into), split=split, std=config.init_std)


def _linear(config: OPTConfig, path: str, out: int, into: int, split: int) -> Iterator[Weight]:
    yield _matrix(config, path, out, into, split)
    if config.enable_bias:
        # Split by input, every part adds to the whole output: the bias must be added once.
        yield Weight(f"{path}.bias", Kind.BIAS, (out,), split=OUT if split == OUT else None)


def _norm(config: OPTConfig, path: str) -> Iterator[Weight]:
    if config.layer_norm_elementwise_affine:
        yield Weight(f"{path}.weight", Kind.NORM_SCALE, (config.hidden_size,), mean=1.0)
        yield Weight(f"{path}.bias", Kind.NORM_BIAS, (config.hidden_size,))


def _decoder(config: OPTConfig) -> Iterator[Weight]:
    C, E, F = config.hidden_size, config.word_embed_proj_dim, config.ffn_dim
    positions = config.max_position_embeddings + config.position_offset
    std, pad = config.init_std, config.pad_token_id
    yield Weight(
        EMBEDDING_NAME, Kind.EMBEDDING, (config.vocab_size, E), split=0, std=std, zero_row=pad
    )
    yield Weight("model.decoder.embed_positions.weight", Kind.EMBEDDING, (positions, C), std=std)
    if config.has_projections:
        yield _matrix(config, "model.decoder.project_out", E, C, None)
        yield _matrix(config, "model.decoder.project_in", C, E, None)
    if config.has_final_layer_norm:
        yield from _norm(config, "model.decoder.final_layer_norm")
    for i in range(config.num_hidden_layers):
        layer, A = f"model.decoder.layers.{i}", config.heads(i) * config.head_dim
        for letter in "kvq":
            yield from _linear(config, f"{layer}.self_attn.{letter}_proj", A, C, OUT)
        yield from _linear(config, f"{layer}.self_attn.out_proj", C, A, INTO)
        yield from _norm(config, f"{layer}.self_attn_layer_norm")
        yield from _linear(config, f"{layer}.fc1", F, C, OUT)
        yield from _linear(config, f"{layer}.fc2", C, F, INTO)
        yield from _norm(config, f"{layer}.final_layer_norm")


def _head(config: OPTConfig, head: Head) -> Iterator[Weight]:
    E = config.word_embed_proj_dim
    if head is Head.CAUSAL_LM and not config.tie_word_embeddings:
        yield _matrix(config, "lm_head", config.vocab_size, E, OUT)
    if head is Head.SEQUENCE_CLASSIFICATION:
        yield _matrix(config, "score", config.num_labels, E, None)
    if head is Head.QUESTION_ANSWERING:
        yield _matrix(config, "qa_outputs", 2, E, None)
        yield Weight("qa_outputs.bias", Kind.BIAS, (2,))


def head_in(config: OPTConfig, names: Iterable[str]) -> Head:
    """The head of a model that holds tensors of these canonical names.

    Names of a head decide, then `architectures`; without either it is a language model.
    """
    for name in names:
        if name.startswith("score."):
            return Head.SEQUENCE_CLASSIFICATION
        if name.startswith("qa_outputs."):
            return Head.QUESTION_ANSWERING
    named = [head for head in Head if f"OPT{head.value}" in (config.architectures or ())]
    return named[0] if named else Head.CAUSAL_LM


def count_parameters(config: OPTConfig, head: Head = Head.CAUSAL_LM) -> int:
    """The number of parameters; a tied head counts once."""
    return sum(row.size for row in table(config, head).values())


def stored_name(name: str, head: Head) -> str:
    """A canonical name as the file of a model with this head spells it."""
    return name.removeprefix("model.") if head is Head.NONE else name


def switched_off(config: OPTConfig, head: Head) -> dict[str, Weight]:
    """The biases and norms that the configuration leaves out; TF and Flax files hold them."""
    on = table(config.replace(enable_bias=True, layer_norm_elementwise_affine=True), head)
    return {name: on[name] for name in on.keys() - table(config, head).keys()}
