"""A checkpoint held against the weight table: what fits, what is missing, what has no place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoint import Checkpoint, CheckpointError, TensorSource, has_nan
from opt_core.config import OPTConfig
from opt_core.weights.table import (
    EMBEDDING_NAME,
    FLOATS,
    LM_HEAD_NAME,
    Head,
    Kind,
    Weight,
    switched_off,
    table,
)


class CheckpointMismatch(CheckpointError):
    """The tensors of a checkpoint are not those that the configuration asks for."""


class CheckpointWarning(UserWarning):
    """Something about loaded weights that a user should know and that does not stop loading."""


@dataclass
class Fit:
    """Which stored tensor fills which row; `new` rows are in no file and start fresh."""

    sources: dict[str, TensorSource] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)


@dataclass
class Match:
    """The tensors of a checkpoint beside the rows of the table, before anybody judges."""

    #: Which stored tensor belongs to which row, whatever its shape and type.
    sources: dict[str, TensorSource] = field(default_factory=dict)
    missing: list[Weight] = field(default_factory=list)
    unexpected: dict[str, TensorSource] = field(default_factory=dict)
    #: Whether a head that is tied to the embedding differs from it, and is therefore left out.
    head_differs: bool = False


def match(config: OPTConfig, head: Head, found: Mapping[str, TensorSource]) -> Match:
    """Put the tensors of a checkpoint (by canonical name) beside the rows of the table.

    Not unexpected are: a tied head; heads that a bare model does without; biases and norms that the
    configuration switches off, if they change nothing.
    """
    rows, left, result = table(config, head), dict(found), Match()
    if config.tie_word_embeddings:
        result.head_differs = _untangle_tied_head(left)
    for name, row in rows.items():
        tensor = left.pop(name, None)
        if tensor is None:
            result.missing.append(row)
        else:
            result.sources[name] = tensor
    neutral = switched_off(config, head) if left else {}
    for name, tensor in left.items():
        if not (_is_other_head(name, head) or _changes_nothing(neutral.get(name), tensor)):
            result.unexpected[name] = tensor
    return result


def mismatch(
    config: OPTConfig, head: Head, matched: Match, source: str
) -> CheckpointMismatch | None:
    """The one error that names all that keeps a checkpoint from being used, or None."""
    rows, faults = table(config, head), _Faults(config)
    for name, tensor in matched.sources.items():
        faults.compare(rows[name], tensor)
    for row in matched.missing:
        faults.missing(row)
    for name, tensor in matched.unexpected.items():
        faults.unexpected(name, tensor)
    return faults.error(source, len(rows), len(matched.sources) + len(matched.unexpected))


def fit(config: OPTConfig, head: Head, found: Mapping[str, TensorSource], *, source: str) -> Fit:
    """Match the tensors of a checkpoint (by canonical name) with the table, strictly.

    A head for classification or question answering may be new, which a `CheckpointWarning` says.
    A tied head that differs from the embedding loses to it, with a warning. Biases and norms that
    the configuration switches off may be in the file if they change nothing.

    Raises:
        CheckpointMismatch: tensors are missing, unexpected, of another shape or not of floating
            type; one error names them all.
    """
    matched = match(config, head, found)
    if matched.head_differs:
        warnings.warn(
            f"{source!r}: {LM_HEAD_NAME} differs from {EMBEDDING_NAME}, but the configuration ties "
            "them: the embedding is used for both; set tie_word_embeddings false to use the head",
            CheckpointWarning,
            stacklevel=5,
        )
    new = [row for row in matched.missing if row.name.startswith(("score.", "qa_outputs."))]
    matched.missing = [row for row in matched.missing if row not in new]
    fault = mismatch(config, head, matched, source)
    if fault is not None:
        raise fault
    if new:
        warnings.warn(
            f"{source!r} holds no {', '.join(row.name for row in new)}: the new head starts from "
            "random values and must be trained before its outputs mean anything",
            CheckpointWarning,
            stacklevel=5,
        )
    return Fit(matched.sources, [row.name for row in new])


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


def _untangle_tied_head(found: dict[str, TensorSource]) -> bool:
    """Leave one of the two names of a tied head, the embedding's; whether they differed."""
    head = found.pop(LM_HEAD_NAME, None)
    if head is None:
        return False
    embedding = found.setdefault(EMBEDDING_NAME, head)
    return embedding != head and not _same(embedding, head)


def _same(one: TensorSource, other: TensorSource) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    parts = (slice(i, i + 1024) for i in range(0, one.shape[0], 1024))
    return all(one.read(part).tobytes() == other.read(part).tobytes() for part in parts)


def _is_other_head(name: str, head: Head) -> bool:
    """Whether a tensor belongs to a head that this model was asked to leave out."""
    heads = {
        Head.NONE: ("lm_head.", "score.", "qa_outputs."),
        Head.CAUSAL_LM: (),
        Head.SEQUENCE_CLASSIFICATION: ("lm_head.",),
        Head.QUESTION_ANSWERING: ("lm_head.",),
    }
    return name.startswith(heads[head])


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

    def error(self, source: str, expected: int, found: int) -> CheckpointMismatch | None:
        if not self.lines:
            return None
        c = self.config
        shown = [f"  {fault:<10}  {name:<55}  {said}" for fault, name, said in self.lines[:20]]
        if len(self.lines) > 20:
            shown.append(f"  … and {len(self.lines) - 20} more")
        return CheckpointMismatch(
            f"{source!r} does not fit an OPT of {c.num_hidden_layers} layers of width "
            f"{c.hidden_size} ({expected} tensors expected, {found} found)\n"
            + "\n".join([*shown, *self.hints])
        )
