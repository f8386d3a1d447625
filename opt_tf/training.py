"""What Keras asks of a model besides its call: steps, losses and metrics, export, data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, ClassVar

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.arguments import IGNORED
from opt_core.config import OPTConfig
from opt_tf.models.inputs import named

_IN_STEP: ContextVar[bool] = ContextVar("in_step", default=False)


def in_step() -> bool:
    """Whether `fit`, `evaluate` or `predict` is calling; they may do so eagerly."""
    return _IN_STEP.get()


@contextmanager
def _step() -> Iterator[None]:
    token = _IN_STEP.set(True)
    try:
        yield
    finally:
        _IN_STEP.reset(token)


class TrainingMixin:
    """Training, evaluation and prediction by Keras's loop, with a loss of the model's own.

    Labels may lie in `x`, under the names of `call`, or in `y`: alone, in a list, or in a mapping
    by the names of labels or of outputs. Without a compiled loss the model's own is taken.
    """

    #: The name of the label that each output is trained for.
    targets: ClassVar[Mapping[str, str]]
    config: OPTConfig

    def train_step(self, data: Any) -> Any:
        """One step of `fit`; its outputs are a plain dictionary in eager execution too."""
        with _step():
            return super().train_step(data)  # type: ignore[misc]

    def test_step(self, data: Any) -> Any:
        """One step of `evaluate`."""
        with _step():
            return super().test_step(data)  # type: ignore[misc]

    def predict_step(self, data: Any) -> Any:
        """One step of `predict`."""
        with _step():
            return super().predict_step(data)  # type: ignore[misc]

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Build losses and metrics, where a strategy asks for it, on a replica's own batch.

        Keras would show the model the mean of all replicas' batches, and the mean of ids is no id.
        """
        strategy = self._distribute_strategy  # type: ignore[attr-defined]
        if iterator is not None and strategy is not None:
            batch = next(batches for _, _, batches in iterator)
            data_batch = keras.tree.map_structure(
                lambda part: strategy.experimental_local_results(part)[0], next(batch)
            )
        super()._maybe_symbolic_build(data_batch=data_batch)  # type: ignore[misc]

    def loss_of(
        self,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        weights: Mapping[str, Any],
    ) -> Tensor:
        """The model's own loss, of outputs, labels and their weights by the names of outputs."""
        raise ValueError(f"{type(self).__name__} has no loss of its own: compile it with one")

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The compiled loss, or the model's own where none was compiled.

        Raises:
            ValueError: there are no labels for a loss.
        """
        labels, weights = self._labels(x, y), self._weights(sample_weight)
        if getattr(self, "loss", None) is not None:
            by_name = isinstance(self.loss, Mapping)  # type: ignore[attr-defined]
            y, y_pred, given = _paired(labels, y_pred, weights, by_name)
            return super().compute_loss(x, y, y_pred, given, training)  # type: ignore[misc]
        if labels is None:
            raise ValueError(
                "there are no labels to train for: pass them in x or in y, under the names "
                + ", ".join(dict.fromkeys(self.targets.values()))
            )
        loss = y_pred.get("loss") if y is None and sample_weight is None else None
        if loss is None:
            loss = self.loss_of(y_pred, labels, weights)
        for more in self.losses:  # type: ignore[attr-defined]
            loss += tf.cast(tf.reduce_sum(more), loss.dtype)
        # Keras adds the gradients of all replicas.
        return loss / tf.cast(tf.distribute.get_strategy().num_replicas_in_sync, loss.dtype)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The compiled metrics; labels in `x` count for them too."""
        labels, weights = self._labels(x, y), self._weights(sample_weight)
        if labels is None:
            return self.get_metrics_result()  # type: ignore[attr-defined]
        y, y_pred, given = _paired(labels, y_pred, weights, len(labels) > 1)
        return super().compute_metrics(x, y, y_pred, given)  # type: ignore[misc]

    def _labels(self, x: Any, y: Any) -> dict[str, Any] | None:
        """Labels by the names of outputs, from `y` or else from `x`; None if there are none."""
        if y is None:
            found = named(self, [x], {})
            found = {k: v for k, v in found.items() if v is not None}
            if not all(label in found for label in self.targets.values()):
                return None
            return {output: found[label] for output, label in self.targets.items()}
        single = not isinstance(y, Mapping | list | tuple)
        found = self._by_output([y] if single else y)
        lacking = [label for out, label in self.targets.items() if found.get(out) is None]
        if lacking:
            raise ValueError(f"y holds no {', '.join(lacking)}")
        return found

    def _weights(self, given: Any) -> dict[str, Any]:
        """Weights by the names of outputs."""
        found = self._by_output(given)
        if isinstance(given, Mapping) and not any(w is not None for w in found.values()):
            raise ValueError(
                f"sample_weight names {', '.join(given)}, but there are labels for "
                + ", ".join(dict.fromkeys(self.targets.values()))
            )
        return found

    def _by_output(self, given: Any) -> dict[str, Any]:
        """Labels or weights by the names of outputs; what is not a structure counts for all."""
        if isinstance(given, Mapping):
            return {out: given.get(label, given.get(out)) for out, label in self.targets.items()}
        if isinstance(given, list | tuple):
            return dict(zip(self.targets, given, strict=False))
        return dict.fromkeys(self.targets, given)

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **options: Any,
    ) -> None:
        """Write a program without this package; it takes ids and mask unless you say otherwise."""
        if input_signature is None:
            # The names are those of the inputs of the served signature.
            ids, mask = (
                keras.layers.InputSpec(dtype="int32", shape=(None, None), name=name)
                for name in ("input_ids", "attention_mask")
            )
            input_signature = [{"input_ids": ids, "attention_mask": mask}]
        super().export(filepath, format, verbose, input_signature, **options)  # type: ignore[misc]

    def prepare_tf_dataset(
        self,
        dataset: Any,
        batch_size: int = 8,
        shuffle: bool = True,
        tokenizer: Any = None,
        *,
        drop_remainder: bool = False,
        prefetch: bool = True,
    ) -> tf.data.Dataset:
        """Batches for `fit` of examples: a `tf.data.Dataset`, columns, or a sequence of examples.

        An example is a mapping, ids alone, or a pair of inputs and labels; of a mapping, what
        `call` names is kept. Shorter rows are padded: ids with the padding id of the tokenizer (or
        of the configuration), labels with -100, anything else with 0; where rows may be of
        different lengths and bring no mask, they get one.

        Raises:
            ValueError: `call` names nothing of an example.
        """
        names = set(list(signature(type(self).call).parameters)[1:])  # type: ignore[attr-defined]
        pad = self.config.pad_token_id if tokenizer is None else tokenizer.pad_token_id
        filling = {"input_ids": 0 if pad is None else pad, "labels": IGNORED}
        examples = dataset if isinstance(dataset, tf.data.Dataset) else _examples(dataset, names)
        examples = examples.map(lambda *example: _known(example, names))
        if shuffle:
            count = int(examples.cardinality())
            examples = examples.shuffle(count if count > 0 else 1000 * batch_size)
        values = _filled(examples.element_spec, filling, "input_ids")
        batches = examples.padded_batch(
            batch_size, padding_values=values, drop_remainder=drop_remainder
        )
        return batches.prefetch(tf.data.AUTOTUNE) if prefetch else batches


def _paired(
    labels: Mapping[str, Any] | None,
    outputs: Any,
    weights: Mapping[str, Any],
    by_name: bool,
) -> tuple[Any, Any, Any]:
    """Labels, what they are for, and weights, in the structure that Keras's losses want."""
    if labels is None:
        return None, outputs, None
    parts: list[Any] = [
        dict(labels),
        {name: outputs[name] for name in labels},
        {name: weights.get(name) for name in labels},
    ]
    if not by_name:
        parts = [list(part.values()) for part in parts]
        if len(labels) == 1:
            parts = [part[0] for part in parts]
    y, chosen, given = parts
    return y, chosen, given if any(w is not None for w in weights.values()) else None


def _known(example: Sequence[Any], names: set[str]) -> Any:
    """One example with nothing but what a model's call takes."""
    inputs = example[0]
    if not isinstance(inputs, Mapping):
        inputs = {"input_ids": inputs}
    kept = {name: value for name, value in inputs.items() if name in names}
    if not kept:
        raise ValueError(f"an example holds {', '.join(inputs)}, of which the call takes nothing")
    ids = kept.get("input_ids")
    if ids is not None and "attention_mask" not in kept and None in ids.shape:
        kept["attention_mask"] = tf.ones_like(ids)
    return (kept, *example[1:]) if len(example) > 1 else kept


def _filled(spec: Any, filling: Mapping[str, int], name: str) -> Any:
    """The padding value of every part of an example."""
    if isinstance(spec, Mapping):
        return {part: _filled(inner, filling, part) for part, inner in spec.items()}
    if isinstance(spec, list | tuple):
        first, *rest = spec
        return (_filled(first, filling, name), *(_filled(x, filling, "labels") for x in rest))
    return tf.constant(filling.get(name, 0), spec.dtype)


def _examples(dataset: Any, names: set[str]) -> tf.data.Dataset:
    """Columns, or anything with a length and places, as examples of rows of any length."""
    if isinstance(dataset, Mapping):
        columns = {name: column for name, column in dataset.items() if name in names}
        length = len(next(iter(columns.values()), ()))
        rows: Any = [{k: v[i] for k, v in columns.items()} for i in range(length)]
    else:
        rows = dataset

    def arrays(row: Any) -> Any:
        if isinstance(row, Mapping):
            return {k: tf.convert_to_tensor(v) for k, v in row.items() if k in names}
        if isinstance(row, tuple):
            return tuple(arrays(part) for part in row)
        return tf.convert_to_tensor(row)

    def spec(value: Any) -> tf.TensorSpec:
        return tf.TensorSpec([None] * value.shape.rank, value.dtype)

    specs = tf.nest.map_structure(spec, arrays(rows[0]))
    made = tf.data.Dataset.from_generator(
        lambda: (arrays(rows[i]) for i in range(len(rows))), output_signature=specs
    )
    return made.apply(tf.data.experimental.assert_cardinality(len(rows)))
