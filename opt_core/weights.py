"""The weight table: every tensor of every OPT model, with what each framework must know of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoint import Checkpoint, CheckpointError, TensorSource, has_nan
from opt_core.config import OPTConfig

#: Axes of a stored `[out, in]` matrix; an embedding is `[rows, width]`.
OUT, INTO = 0, 1
FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
EMBEDDING_NAME = "model.decoder.embed_tokens.weight"
LM_HEAD_NAME = "lm_head.weight"


class CheckpointMismatch(CheckpointError):
    """The tensors of a checkpoint are not those that the configuration asks for."""


class CheckpointWarning(UserWarning):
    """Something about loaded weights that a user should know and that does not stop loading."""


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


@dataclass
class Fit:
    """Which stored tensor fills which row; `new` rows are in no file and start fresh."""

    sources: dict[str, TensorSource] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)


def fit(config: OPTConfig, head: Head, found: Mapping[str, TensorSource], *, source: str) -> Fit:
    """Match the tensors of a checkpoint (by canonical name) with the table, strictly.

    A head for classification or question answering may be new, which a `CheckpointWarning` says.
    A tied head that differs from the embedding loses to it, with a warning. Biases and norms that
    the configuration switches off may be in the file if they change nothing.

    Raises:
        CheckpointMismatch: tensors are missing, unexpected, of another shape or not of floating
            type; one error names them all.
    """
    rows, left = table(config, head), dict(found)
    if config.tie_word_embeddings:
        _untangle_tied_head(left, source)
    result, faults = Fit(), _Faults(config)
    for name, row in rows.items():
        tensor = left.pop(name, None)
        if tensor is not None:
            result.sources[name] = tensor
            faults.compare(row, tensor)
        elif name.startswith(("score.", "qa_outputs.")):
            result.new.append(name)
        else:
            faults.missing(row)
    neutral = switched_off(config, head) if left else {}
    for name, tensor in left.items():
        if not (_is_other_head(name, head) or _changes_nothing(neutral.get(name), tensor)):
            faults.unexpected(name, tensor)
    faults.raise_for(source, len(rows), len(found))
    if result.new:
        warnings.warn(
            f"{source!r} holds no {', '.join(result.new)}: the new head starts from random values "
            "and must be trained before its outputs mean anything",
            CheckpointWarning,
            stacklevel=5,
        )
    return result


def read(
    config: OPTConfig, head: Head, checkpoint: Checkpoint, *, check: bool
) -> Iterator[tuple[Weight, NDArray[Any] | None]]:
    """Each row of the table with its values in the stored layout and type, largest first.

    The values are mapped from the file, copy on write. None stands for a row that is in no file
    and starts fresh. With `check`, NaN in a weight warns, after the last of them.

    Raises:
        CheckpointMismatch: the tensors are not those that the configuration asks for.
    """
    rows = table(config, head)
    matched = fit(config, head, checkpoint.tensors, source=str(checkpoint.path))
    spoiled = []
    for name, source in sorted(matched.sources.items(), key=lambda item: -rows[item[0]].size):
        values = source.map()
        if check and has_nan(values):
            spoiled.append(name)
        yield rows[name], values
    yield from ((rows[name], None) for name in matched.new)
    if spoiled:
        warnings.warn(
            f"{checkpoint.path}: there are NaN values in {', '.join(spoiled)}; what the model "
            "computes with them is NaN too",
            CheckpointWarning,
            stacklevel=4,
        )


def _untangle_tied_head(found: dict[str, TensorSource], source: str) -> None:
    """Leave one of the two names of a tied head: the embedding's."""
    head = found.pop(LM_HEAD_NAME, None)
    if head is None:
        return
    embedding = found.setdefault(EMBEDDING_NAME, head)
    if embedding != head and not _same(embedding, head):
        warnings.warn(
            f"{source!r}: {LM_HEAD_NAME} differs from {EMBEDDING_NAME}, but the configuration ties "
            "them: the embedding is used for both; set tie_word_embeddings false to use the head",
            CheckpointWarning,
            stacklevel=6,
        )


def _same(one: TensorSource, other: TensorSource) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    left, right = one.map(), other.map()
    blocks = range(0, one.shape[0], 1024)
    return all(left[i : i + 1024].tobytes() == right[i : i + 1024].tobytes() for i in blocks)


def _is_other_head(name: str, head: Head) -> bool:
    """Whether a tensor belongs to a head that this model was asked to leave out."""
    heads = {
        Head.NONE: ("lm_head.", "score.", "qa_outputs."),
        Head.CAUSAL_LM: (),
        Head.SEQUENCE_CLASSIFICATION: ("lm_head.",),
        Head.QUESTION_ANSWERING: ("lm_head.",),
    }
    return name.startswith(heads[head])


def switched_off(config: OPTConfig, head: Head) -> dict[str, Weight]:
    """The biases and norms that the configuration leaves out; TF and Flax files hold them."""
    on = table(config.replace(enable_bias=True, layer_norm_elementwise_affine=True), head)
    return {name: on[name] for name in on.keys() - table(config, head).keys()}


def _changes_nothing(row: Weight | None, tensor: TensorSource) -> bool:
    """Whether a tensor holds the 0 of a bias or the 1 of a norm that is switched off."""
    if row is None or row.shape != tensor.shape:
        return False
    return bool(np.all(tensor.map() == row.mean))


class _Faults:
    """What is wrong with a checkpoint, gathered so that one error says it all."""

    def __init__(self, config: OPTConfig) -> None:
        self.config = config
        self.lines: list[tuple[str, str, str]] = []
        self.hints: list[str] = []

    def missing(self, row: Weight) -> None:
        self.lines.append(("missing", row.name, str(row.shape)))
        if row.name.startswith("model.decoder.final_layer_norm."):
            self._hint(
                "files from before June 2022 lack the last norm, and their models were run without "
                "it: if this is one of them, set _remove_final_layer_norm true in its configuration"
            )

    def unexpected(self, name: str, tensor: TensorSource) -> None:
        self.lines.append(("unexpected", name, str(tensor.shape)))

    def compare(self, row: Weight, tensor: TensorSource) -> None:
        if tensor.dtype not in FLOATS:
            self.lines.append(("not floats", row.name, f"found {tensor.dtype} values"))
        if tensor.shape != row.shape:
            said = f"expected {row.shape}, found {tensor.shape}"
            self.lines.append(("misshapen", row.name, said))
            self._explain(row, tensor.shape)

    def _explain(self, row: Weight, shape: tuple[int, ...]) -> None:
        hint = ""
        if row.kind is Kind.MATRIX and shape == row.shape[::-1]:
            hint = "matrices are stored [out, in]; this file seems to hold them transposed"
        elif "embed_positions" in row.name and shape[:1] == (self.config.max_position_embeddings,):
            hint = (
                f"{self.config.position_offset} rows short: OPT keeps that many unused rows before "
                "position 0; was this file written without them?"
            )
        if hint:
            self._hint(hint)

    def _hint(self, text: str) -> None:
        if text not in self.hints:
            self.hints.append(text)

    def raise_for(self, source: str, expected: int, found: int) -> None:
        if not self.lines:
            return
        c = self.config
        shown = [f"  {fault:<10}  {name:<55}  {said}" for fault, name, said in self.lines[:20]]
        if len(self.lines) > 20:
            shown.append(f"  … and {len(self.lines) - 20} more")
        raise CheckpointMismatch(
            f"{source!r} does not fit an OPT of {c.num_hidden_layers} layers of width "
            f"{c.hidden_size} ({expected} tensors expected, {found} found)\n"
            + "\n".join([*shown, *self.hints])
        )
