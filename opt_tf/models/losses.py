"""The losses of the four heads, each a mean in float32."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core import arguments
from opt_core.arguments import IGNORED
from opt_core.config import OPTConfig
from opt_tf.decoder import size


def causal_lm_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """`[B, T, V]` logits and `[B, T]` labels -> mean cross-entropy of each next token.

    Labels of -100 do not count; NaN where none counts. `weights`, `[B]` or `[B, T]` as the labels,
    multiply what a label adds, and not what the sum is divided by (Keras's habit).

    Raises:
        ValueError: labels of another shape, or outside the vocabulary.
    """
    if None not in (*labels.shape, *logits.shape[:2]):
        arguments.check_language_labels(tuple(labels.shape), tuple(logits.shape[:2]))
    # Moving the labels instead of cutting the logits saves a copy of the largest tensor there is.
    following = tf.pad(labels[:, 1:], [[0, 0], [0, 1]], constant_values=IGNORED)
    if weights is not None:
        weights = tf.reshape(weights, (size(labels, 0), -1)) + tf.zeros_like(labels, weights.dtype)
        weights = tf.pad(weights[:, 1:], [[0, 0], [0, 1]])
    return _cross_entropy(logits, following, "labels", weights)


def classification_loss(
    logits: Tensor, labels: Tensor, config: OPTConfig, weights: Tensor | None = None
) -> Tensor:
    """`[B, num_labels]` logits -> mean square, cross-entropy or binary cross-entropy.

    `problem_type` decides; without it one label means regression, whole-number labels one class
    a row, and other labels several classes a row. `weights` are `[B]`.

    Raises:
        ValueError: labels that do not fit the logits.
    """
    problem = arguments.problem_of(config, whole=not labels.dtype.is_floating)
    if None not in (*labels.shape, *logits.shape):
        arguments.check_class_labels(problem, tuple(labels.shape), tuple(logits.shape))
    if problem == "single_label_classification":
        return _cross_entropy(logits, tf.reshape(labels, [-1]), "labels", weights)
    scores = _wide(logits)
    target = tf.cast(tf.reshape(labels, tf.shape(logits)), scores.dtype)
    if problem == "regression":
        each = tf.math.squared_difference(scores, target)
    else:
        each = tf.nn.sigmoid_cross_entropy_with_logits(target, scores)
    if weights is not None:
        each *= tf.cast(tf.reshape(weights, (-1, 1)), each.dtype)
    return tf.reduce_mean(each)


def question_answering_loss(
    start: Tensor,
    end: Tensor,
    starts: Tensor,
    ends: Tensor,
    start_weights: Tensor | None = None,
    end_weights: Tensor | None = None,
) -> Tensor:
    """`[B, T]` logits and `[B]` or `[B, 1]` places -> mean of both cross-entropies.

    A negative place counts as 0, a place from T on does not count. Weights are `[B]`.

    Raises:
        ValueError: not one place a row.
    """
    first = _place_loss(start, starts, "start", start_weights)
    return (first + _place_loss(end, ends, "end", end_weights)) / 2


def _place_loss(logits: Tensor, places: Tensor, name: str, weights: Tensor | None) -> Tensor:
    if None not in (*places.shape, logits.shape[0]):
        arguments.check_places(name, tuple(places.shape), logits.shape[0])
    places = tf.cast(tf.reshape(places, [-1]), tf.int64)
    end = tf.shape(logits, tf.int64)[1]
    places = tf.where(places >= end, tf.constant(IGNORED, tf.int64), tf.maximum(places, 0))
    return _cross_entropy(logits, places, f"{name}_positions", weights)


def _cross_entropy(
    logits: Tensor, labels: Tensor, name: str, weights: Tensor | None = None
) -> Tensor:
    scores, labels, classes = _wide(logits), tf.cast(labels, tf.int64), size(logits, -1)
    counts = labels != IGNORED
    known = (labels >= 0) & (labels < tf.cast(classes, tf.int64))
    if tf.executing_eagerly():
        wrong = tf.boolean_mask(labels, counts & ~known)
        if len(wrong):
            raise arguments.unknown_label(name, int(wrong[0]), int(classes))
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(known, labels, 0), scores)
    # A program cannot stop at a label that is no class: it answers NaN.
    each = tf.where(known, each, tf.constant(np.nan, each.dtype))
    if weights is not None:
        each *= tf.cast(tf.reshape(weights, tf.shape(each)), each.dtype)
    total = tf.reduce_sum(tf.where(counts, each, 0))
    return total / tf.reduce_sum(tf.cast(counts, each.dtype))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
