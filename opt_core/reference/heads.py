"""The four heads of OPT and their losses in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from opt_core.config import OPTConfig
from opt_core.reference.inputs import Floats, Ints, visible, whole_numbers
from opt_core.reference.model import Forward, Weights, forward

#: A label that no loss counts: PyTorch's default.
IGNORED = -100


class CausalLM(NamedTuple):
    """Scores of the next token at every place, and what they come from."""

    #: The mean cross-entropy of `labels` one place on; None without labels.
    loss: float | None
    #: float64 [B, T, V].
    logits: Floats
    forward: Forward


class SequenceClassification(NamedTuple):
    """Scores of the classes of every row, and what they come from."""

    loss: float | None
    #: float64 [B, K], K = `num_labels`.
    logits: Floats
    forward: Forward


class QuestionAnswering(NamedTuple):
    """Scores of every place as the start and as the end of the answer."""

    loss: float | None
    #: float64 [B, T], both.
    start_logits: Floats
    end_logits: Floats
    forward: Forward


def causal_lm(
    config: OPTConfig,
    weights: Weights,
    *,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    labels: Any = None,
) -> CausalLM:
    """Score the next token: `[B, T] int -> [B, T, V]` float64, and the loss of `labels` `[B, T]`.

    The label at a place is predicted at the place before; -100 is not counted, and nothing counted
    gives NaN.

    Raises:
        ValueError: as `forward`; labels of another shape or outside the vocabulary.
    """
    passed = forward(
        config,
        weights,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        head_mask=head_mask,
    )
    logits = passed.last_hidden_state @ output_embedding(config, weights).T  # [B, T, V]
    passed.modules["lm_head"] = logits
    if labels is None:
        return CausalLM(None, logits, passed)
    targets = _labels(labels, logits.shape[:2], config.vocab_size)
    loss = cross_entropy(logits[:, :-1].reshape(-1, config.vocab_size), targets[:, 1:].ravel())
    return CausalLM(loss, logits, passed)


def output_embedding(config: OPTConfig, weights: Weights) -> Floats:
    """What scores the tokens: the embedding table when tied, else the head's own -> [V, E]."""
    tied = config.tie_word_embeddings
    name = "model.decoder.embed_tokens.weight" if tied else "lm_head.weight"
    return np.asarray(weights[name], np.float64)


def sequence_classification(
    config: OPTConfig,
    weights: Weights,
    *,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    labels: Any = None,
) -> SequenceClassification:
    """Score the classes of every row at its last token: `[B, T] int -> [B, K]` float64.

    The last token is the last one that `attention_mask` shows; without a mask the last id that is
    not `pad_token_id`; of embeddings without a mask, or with no pad id, the last one. A row that
    holds no such token is scored at place 0.

    Raises:
        ValueError: as `forward`; several rows of ids without a mask and without a pad id; labels
            that do not fit the loss.
    """
    passed = forward(
        config,
        weights,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        head_mask=head_mask,
    )
    scores = passed.last_hidden_state @ np.asarray(weights["score.weight"], np.float64).T
    passed.modules["score"] = scores  # [B, T, K]
    rows = np.arange(scores.shape[0])
    logits = scores[rows, last_places(config, scores.shape, input_ids, attention_mask)]  # [B, K]
    loss = None if labels is None else classification_loss(config, logits, labels)
    return SequenceClassification(loss, logits, passed)


def last_places(
    config: OPTConfig, shape: tuple[int, ...], input_ids: Any, attention_mask: Any
) -> Ints:
    """The place of every row's last token -> int64 [B]."""
    batch, length = shape[:2]
    if attention_mask is not None:
        real = visible(attention_mask, batch, length)
    elif input_ids is None:
        real = np.ones((batch, length), np.bool_)
    elif config.pad_token_id is not None:
        real = np.asarray(input_ids) != config.pad_token_id
    elif batch == 1:
        real = np.ones((batch, length), np.bool_)
    else:
        raise ValueError(
            f"the ends of {batch} rows are unknown: the configuration has no pad_token_id and "
            "there is no attention_mask; give one of the two"
        )
    return np.asarray((real * np.arange(length)).max(axis=1))


def classification_loss(config: OPTConfig, logits: Floats, labels: Any) -> float:
    """The loss that `problem_type` names; None decides by the number and the type of the labels.

    One class is regression (mean square), whole-number labels are one class for each row
    (cross-entropy), others are a yes or no for every class (binary cross-entropy).

    Raises:
        ValueError: labels of a shape or value that the loss cannot take.
    """
    given = np.asarray(labels)
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None:
        is_whole = np.issubdtype(given.dtype, np.integer)
        kind = "single_label_classification" if is_whole else "multi_label_classification"
    if kind == "single_label_classification":
        column = given[:, 0] if given.shape == (len(logits), 1) else given
        return cross_entropy(logits, _labels(column, logits.shape[:1], config.num_labels))
    if kind == "regression" and config.num_labels == 1 and given.size == len(logits):
        given = given.reshape(logits.shape)
    if given.shape != logits.shape:
        raise ValueError(
            f"labels have shape {given.shape}, but {kind} compares them with scores of shape "
            f"{logits.shape}"
        )
    targets = given.astype(np.float64)
    if kind == "regression":
        return float(((logits - targets) ** 2).mean())
    # log(1 + exp(x)) - x * y, in the form that does not overflow.
    softplus = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
    return float((softplus - logits * targets).mean())


def question_answering(
    config: OPTConfig,
    weights: Weights,
    *,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    start_positions: Any = None,
    end_positions: Any = None,
) -> QuestionAnswering:
    """Score every place as start and end of the answer: `[B, T] int -> [B, T]` twice, float64.

    The loss is the mean of the two cross-entropies. A position of T or more is not counted, a
    negative one counts as 0.

    Raises:
        ValueError: as `forward`; one of the two positions alone, or not one for each row.
    """
    passed = forward(
        config,
        weights,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        head_mask=head_mask,
    )
    kernel, bias = (np.asarray(weights[f"qa_outputs.{n}"], np.float64) for n in ("weight", "bias"))
    scores = passed.last_hidden_state @ kernel.T + bias  # [B, T, 2]
    passed.modules["qa_outputs"] = scores
    start, end = scores[..., 0], scores[..., 1]  # [B, T]
    if (start_positions is None) != (end_positions is None):
        raise ValueError("give both start_positions and end_positions, or none of them")
    if start_positions is None:
        return QuestionAnswering(None, start, end, passed)
    loss = (_place_loss(start, start_positions) + _place_loss(end, end_positions)) / 2
    return QuestionAnswering(loss, start, end, passed)


def _place_loss(scores: Floats, places: Any) -> float:
    batch, length = scores.shape
    targets = whole_numbers("answer positions", places)
    if targets.shape not in ((batch,), (batch, 1)):
        raise ValueError(
            f"answer positions have shape {targets.shape}; there must be one for each of the "
            f"{batch} rows"
        )
    clamped = np.maximum(targets.reshape(batch), 0)
    return cross_entropy(scores, np.where(clamped >= length, IGNORED, clamped))


def cross_entropy(logits: Floats, labels: Ints) -> float:
    """The mean negative log-probability: [N, K], int [N] -> number; NaN if all labels are -100."""
    counted = labels != IGNORED
    if not counted.any():
        return math.nan
    scores, targets = logits[counted], labels[counted]
    highest = scores.max(axis=1)
    totals = np.log(np.exp(scores - highest[:, None]).sum(axis=1)) + highest
    return float((totals - scores[np.arange(len(targets)), targets]).mean())


def _labels(values: Any, shape: tuple[int, ...], end: int) -> Ints:
    labels = whole_numbers("labels", values)
    if labels.shape != shape:
        raise ValueError(f"labels have shape {labels.shape}; they must have {shape}")
    outside = np.argwhere((labels != IGNORED) & ((labels < 0) | (labels >= end)))
    if outside.size:
        place = tuple(int(i) for i in outside[0])
        raise ValueError(
            f"labels hold {labels[place]} at {place}; they must be {IGNORED}, which is not "
            f"counted, or from 0 to {end - 1}"
        )
    return labels
