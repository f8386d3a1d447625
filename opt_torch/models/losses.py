"""The losses of the four heads, each a mean in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core import arguments
from opt_core.arguments import IGNORED
from opt_core.config import OPTConfig


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`[B, T, V]` logits and `[B, T]` labels -> mean cross-entropy of each next token.

    Labels of -100 do not count; NaN where none counts.

    Raises:
        ValueError: labels of another shape, or outside the vocabulary.
    """
    arguments.check_language_labels(tuple(labels.shape), tuple(logits.shape[:2]))
    # Moving the labels instead of cutting the logits saves a copy of the largest tensor there is.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return _cross_entropy(logits.flatten(0, 1), following.flatten(), "labels")


def classification_loss(logits: Tensor, labels: Tensor, config: OPTConfig) -> Tensor:
    """`[B, num_labels]` logits -> mean square, cross-entropy or binary cross-entropy.

    `problem_type` decides; without it one label means regression, whole-number labels one class
    a row, and other labels several classes a row.

    Raises:
        ValueError: labels that do not fit the logits.
    """
    problem = arguments.problem_of(config, whole=not labels.is_floating_point())
    arguments.check_class_labels(problem, tuple(labels.shape), tuple(logits.shape))
    if problem == "single_label_classification":
        return _cross_entropy(logits, labels.flatten(), "labels")
    target = labels.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    target, scores = target.reshape(logits.shape), logits.to(target.dtype)
    if problem == "regression":
        return F.mse_loss(scores, target)
    return F.binary_cross_entropy_with_logits(scores, target)


def question_answering_loss(start: Tensor, end: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """`[B, T]` logits and `[B]` or `[B, 1]` places -> mean of both cross-entropies.

    A negative place counts as 0, a place from T on does not count.

    Raises:
        ValueError: not one place a row.
    """
    return (_place_loss(start, starts, "start") + _place_loss(end, ends, "end")) / 2


def _place_loss(logits: Tensor, places: Tensor, name: str) -> Tensor:
    arguments.check_places(name, tuple(places.shape), logits.shape[0])
    end = logits.shape[1]
    places = places.to(logits.device).flatten().clamp(0, end)
    return _cross_entropy(logits, places.masked_fill(places == end, IGNORED), f"{name}_positions")


def _cross_entropy(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    labels = labels.to(logits.device, torch.long)
    classes = logits.shape[-1]
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise arguments.unknown_label(name, int(wrong[0]), classes)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(scores, labels, ignore_index=IGNORED)
