"""The records that models return: read by attribute, by key, by index or as a tuple."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class ModelOutput(dict[str, Any]):
    """A dictionary of the values that a call produced, in the documented order.

    A value that was not asked for is absent from the dictionary, None as an attribute, and not
    counted by index: with labels `output[0]` is the loss, without it is the logits.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any
    ) -> None:
        given = {**dict(values), **more}
        super().__init__(
            {name: given.pop(name) for name in self.fields if given.get(name) is not None}
        )
        unknown = [name for name, value in given.items() if name not in self.fields]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(unknown)}")

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.fields:
            raise TypeError(f"{type(self).__name__} has no field {name!r}")
        if value is None:
            self.pop(name, None)
        else:
            super().__setitem__(name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values alone, in the order of the fields."""
        return tuple(self[name] for name in self.fields if name in self)


class BaseModelOutputWithPast(ModelOutput):
    """What `OPTModel` returns: `last_hidden_state` is `[B, T, E]`."""

    fields = ("last_hidden_state", "past_key_values", "hidden_states", "attentions")


class CausalLMOutputWithPast(ModelOutput):
    """What `OPTForCausalLM` returns: `logits` is `[B, T, V]`, `loss` a mean over shifted labels."""

    fields = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class SequenceClassifierOutputWithPast(ModelOutput):
    """What `OPTForSequenceClassification` returns: `logits` is `[B, num_labels]`."""

    fields = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class QuestionAnsweringModelOutput(ModelOutput):
    """What `OPTForQuestionAnswering` returns: `start_logits` and `end_logits` are `[B, T]`."""

    fields = (
        "loss",
        "start_logits",
        "end_logits",
        "past_key_values",
        "hidden_states",
        "attentions",
    )


class GenerateOutput(ModelOutput):
    """What `generate` returns as a record, with n new tokens.

    `sequences` is `[R, P + n]`, prompt included, R the number of returned sequences.
    `sequences_scores` `[R]` are the scores by which beams were ranked. `scores` and `logits` hold a
    `[B, V]` for every step (`[B * K, V]` with beams): after the rules, and as the model gave them;
    the scores of beams are log-probabilities. `beam_indices` `[R, n]` says from which running beam
    (text * K + beam) each token was chosen, -1 behind the end. `attentions` and `hidden_states`
    hold for every step one array a layer, `[R, H, T, S]` and `[R, T, C]`, T being P in the first
    step and then 1; they belong to the returned sequences.
    """

    fields = (
        "sequences",
        "sequences_scores",
        "scores",
        "logits",
        "beam_indices",
        "attentions",
        "hidden_states",
        "past_key_values",
    )
