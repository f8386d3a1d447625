"""The losses of the four heads, each a mean in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from opt_core import arguments
from opt_core.arguments import IGNORED
from opt_core.config import OPTConfig
from opt_core.weights import Head
from opt_flax.attention import wide
from opt_flax.models.inputs import known


def causal_lm_loss(logits: Array, labels: Any) -> Array:
    """`[B, T, V]` logits and `[B, T]` labels -> mean cross-entropy of each next token.

    Labels of -100 do not count; NaN where none counts.

    Raises:
        ValueError: labels of another shape.
    """
    arguments.check_language_labels(tuple(labels.shape), tuple(logits.shape[:2]))
    # Moving the labels instead of cutting the logits saves a copy of the largest array there is.
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return _cross_entropy(logits, following)


def classification_loss(logits: Array, labels: Any, config: OPTConfig) -> Array:
    """`[B, num_labels]` logits -> mean square, cross-entropy or binary cross-entropy.

    `problem_type` decides; without it one label means regression, whole-number labels one class
    a row, and other labels several classes a row.

    Raises:
        ValueError: labels that do not fit the logits.
    """
    problem = arguments.problem_of(config, whole=_is_whole(labels))
    arguments.check_class_labels(problem, tuple(labels.shape), tuple(logits.shape))
    if problem == "single_label_classification":
        return _cross_entropy(logits, jnp.reshape(labels, -1))
    kind = wide(logits.dtype)
    target, scores = jnp.reshape(labels, logits.shape).astype(kind), logits.astype(kind)
    if problem == "regression":
        return jnp.mean(jnp.square(scores - target))
    # log(1 + e^s) - s y, in the form that does not overflow.
    return jnp.mean(jax.nn.softplus(scores) - scores * target)


def question_answering_loss(start: Array, end: Array, starts: Any, ends: Any) -> Array:
    """`[B, T]` logits and `[B]` or `[B, 1]` places -> mean of both cross-entropies.

    A negative place counts as 0, a place from T on does not count.

    Raises:
        ValueError: not one place a row.
    """
    return (_place_loss(start, starts, "start") + _place_loss(end, ends, "end")) / 2


def check_labels(config: OPTConfig, labels: Any, head: Head) -> None:
    """Look for labels that are no class, where Python can look; elsewhere they give NaN.

    Raises:
        ValueError: there is one.
    """
    classes = config.vocab_size
    if head is Head.SEQUENCE_CLASSIFICATION:
        classes = config.num_labels
        problem = arguments.problem_of(config, whole=_is_whole(labels))
        if problem != "single_label_classification":
            return
    found = known(labels)
    if found is None:
        return
    wrong = found[(found != IGNORED) & ((found < 0) | (found >= classes))]
    if wrong.size:
        raise arguments.unknown_label("labels", int(wrong[0]), classes)


def _is_whole(labels: Any) -> bool:
    return not jnp.issubdtype(labels.dtype, jnp.inexact)


def _place_loss(logits: Array, places: Any, name: str) -> Array:
    arguments.check_places(name, tuple(places.shape), logits.shape[0])
    end = logits.shape[1]
    places = jnp.clip(jnp.reshape(places, -1).astype(jnp.int32), 0, end)
    return _cross_entropy(logits, jnp.where(places == end, IGNORED, places))


def _cross_entropy(logits: Array, labels: Array) -> Array:
    """`[..., V]` logits and `[...]` labels -> the mean over labels that count."""
    labels, classes = labels.astype(jnp.int32), logits.shape[-1]
    scores = logits.astype(wide(logits.dtype))
    counts = labels != IGNORED
    is_class = (labels >= 0) & (labels < classes)
    chosen = jnp.take_along_axis(scores, jnp.where(is_class, labels, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(scores, axis=-1) - chosen[..., 0]
    losses = jnp.where(is_class, losses, jnp.where(counts, jnp.nan, 0.0))
    return losses.sum() / counts.sum().astype(losses.dtype)
