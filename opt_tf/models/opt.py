"""OPT for Keras: the bare model and its three heads, called as in Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.arguments import check_both_places, unknown_ends
from opt_core.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from opt_core.weights import Head
from opt_tf.attention import choose
from opt_tf.decoder import Cache, Decoder, size
from opt_tf.generation import GenerationMixin
from opt_tf.layers import TiedHead, linear
from opt_tf.models import inputs, losses
from opt_tf.models.base import TFOPTPreTrainedModel

_registered = keras.saving.register_keras_serializable(package="optlm")


@_registered
class TFOPTModel(TFOPTPreTrainedModel):
    """OPT without a head: tokens in, hidden states out."""

    head = Head.NONE
    targets: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"last_hidden_state": "last_hidden_state"}
    )

    def _add_parts(self) -> None:
        self.decoder = Decoder(self.config, dtype=self.dtype_policy, name="decoder")

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        self.decoder.build()

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
        *,
        position_ids: Any = None,
    ) -> Any:
        """`[B, T]` ids, or `[B, T, E]` embeddings -> `[B, T, E]` hidden states.

        `attention_mask` is 0 or 1, `[B, past + T]`; without it everything counts. `position_ids`
        start at 0 and come from the mask unless given. `head_mask` is `[L, H]` or `[H]`: a factor
        for each head. `past_key_values` is what an earlier call returned, or pairs per layer.

        Raises:
            ValueError: an argument of the wrong shape or range.
        """
        config = self.config
        caching = self._caches(use_cache, training)
        wants_weights = _given(output_attentions, config.output_attentions)
        ids = inputs.tensor(input_ids)
        tokens = inputs.check_tokens(config, ids, inputs.tensor(inputs_embeds))
        call = inputs.resolve(
            config,
            tokens,
            attention_mask=inputs.tensor(attention_mask),
            position_ids=inputs.tensor(position_ids),
            head_mask=inputs.tensor(head_mask),
            past=Cache.of(past_key_values, config.num_hidden_layers),
            caching=caching,
        )
        attend = choose(
            self.attn_implementation,
            call.visible,
            dropout=config.attention_dropout,
            weights=wants_weights,
        )
        out = self.decoder(
            tokens if ids is None else self.decoder.embed_tokens(tokens),
            positions=call.positions,
            attend=attend,
            cache=call.cache,
            head_mask=call.head_mask,
            collect_states=_given(output_hidden_states, config.output_hidden_states),
            training=training,
        )
        record = BaseModelOutputWithPast(
            last_hidden_state=out.last,
            past_key_values=out.cache if caching else None,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return self._answer(record, return_dict)


class _Headed(TFOPTPreTrainedModel):
    """A class with a head on the base model."""

    def _add_parts(self) -> None:
        self.model = TFOPTModel(self.config, dtype=self.dtype_policy, name="model", _values=None)
        self._add_head()

    def _add_head(self) -> None:
        """Make the layer that sits on the base model."""
        raise AssertionError("every class with a head says what it is")

    def _passed(self, training: bool, use_cache: bool | None, **given: Any) -> Mapping[str, Any]:
        """The base model's outputs, the cache whole."""
        caching = self._caches(use_cache, training)
        out = dict(self.model(use_cache=caching, return_dict=True, training=training, **given))
        out["past_key_values"] = Cache.of(out.get("past_key_values"), self.config.num_hidden_layers)
        return out


@_registered
class TFOPTForCausalLM(GenerationMixin, _Headed):
    """OPT with its language-model head: the scores of every next token, and `generate`."""

    head = Head.CAUSAL_LM
    targets: ClassVar[Mapping[str, str]] = MappingProxyType({"logits": "labels"})

    def _add_head(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head = TiedHead(dtype=self.dtype_policy, name="lm_head")
        else:
            self.lm_head = linear(self.config.vocab_size, False, self.dtype_policy, "lm_head")

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        self.model.build()
        self.lm_head.build((None, None, self.config.word_embed_proj_dim))

    def call(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Any:
        """As `TFOPTModel`, but `[B, T, V]` logits; with `[B, T]` labels also the loss.

        The loss is the mean cross-entropy of each next token; labels of -100 do not count.

        Raises:
            ValueError: as `TFOPTModel`, or labels of the wrong shape or range.
        """
        out = self._passed(
            training,
            use_cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
        )
        logits = self.scores(out["last_hidden_state"])  # [B, T, V]
        target = inputs.tensor(labels)
        loss = None if target is None else losses.causal_lm_loss(logits, target)
        record = CausalLMOutputWithPast(loss=loss, logits=logits, **_rest(out))
        return self._answer(record, return_dict)

    def scores(self, hidden: Tensor) -> Tensor:
        """`[..., E]` last hidden states -> `[..., V]`, of the type of the weights."""
        if not self.config.tie_word_embeddings:
            return tf.cast(self.lm_head(hidden), self.variable_dtype)
        table = self.model.decoder.embed_tokens.embeddings
        return tf.cast(self.lm_head(hidden, table=table), self.variable_dtype)

    def loss_of(
        self,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        weights: Mapping[str, Any],
    ) -> Tensor:
        """The mean cross-entropy of each next token, weighted by rows or tokens."""
        target = tf.convert_to_tensor(labels["logits"])
        return losses.causal_lm_loss(outputs["logits"], target, inputs.tensor(weights["logits"]))


@_registered
class TFOPTForSequenceClassification(_Headed):
    """OPT with a linear head on the last real token of every row."""

    head = Head.SEQUENCE_CLASSIFICATION
    targets: ClassVar[Mapping[str, str]] = MappingProxyType({"logits": "labels"})

    def _add_head(self) -> None:
        self.score = linear(self.config.num_labels, False, self.dtype_policy, "score")

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        self.model.build()
        self.score.build((None, self.config.word_embed_proj_dim))

    @property
    def num_labels(self) -> int:
        """How many classes the head tells apart."""
        return self.config.num_labels

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
        *,
        position_ids: Any = None,
    ) -> Any:
        """As `TFOPTModel`, but `[B, num_labels]` logits of each row's last real token.

        That is the last place that the mask shows; without a mask the last id that is not the
        padding id; with embeddings alone the last place.

        Raises:
            ValueError: as `TFOPTModel`; labels that do not fit; or several rows of ids with neither
                a mask nor a padding id.
        """
        mask, ids = inputs.tensor(attention_mask), inputs.tensor(input_ids)
        out = self._passed(
            training,
            use_cache,
            input_ids=ids,
            attention_mask=mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
        )
        hidden = out["last_hidden_state"]  # [B, T, E]
        places = _last_real(ids, mask, hidden, self.config.pad_token_id)
        last = tf.gather(hidden, places, batch_dims=1)  # [B, E]
        logits = tf.cast(self.score(last), self.variable_dtype)  # [B, num_labels]
        target = inputs.tensor(labels)
        loss = None
        if target is not None:
            loss = losses.classification_loss(logits, target, self.config)
        record = SequenceClassifierOutputWithPast(loss=loss, logits=logits, **_rest(out))
        return self._answer(record, return_dict)

    def loss_of(
        self,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        weights: Mapping[str, Any],
    ) -> Tensor:
        """The loss of the configuration's problem, weighted by rows."""
        target = tf.convert_to_tensor(labels["logits"])
        given = inputs.tensor(weights["logits"])
        return losses.classification_loss(outputs["logits"], target, self.config, given)


@_registered
class TFOPTForQuestionAnswering(_Headed):
    """OPT with a head that scores where an answer starts and ends."""

    head = Head.QUESTION_ANSWERING
    targets: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"start_logits": "start_positions", "end_logits": "end_positions"}
    )

    def _add_head(self) -> None:
        self.qa_outputs = linear(2, True, self.dtype_policy, "qa_outputs")

    def build(self, input_shape: Any = None) -> None:
        """Make all weights."""
        self.model.build()
        self.qa_outputs.build((None, None, self.config.word_embed_proj_dim))

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
        *,
        position_ids: Any = None,
    ) -> Any:
        """As `TFOPTModel`, but `[B, T]` start and end logits; with `[B]` places also the loss.

        Raises:
            ValueError: as `TFOPTModel`, or only one of the two places was given.
        """
        starts, ends = inputs.tensor(start_positions), inputs.tensor(end_positions)
        check_both_places(starts is not None, ends is not None)
        out = self._passed(
            training,
            use_cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
        )
        scores = tf.cast(self.qa_outputs(out["last_hidden_state"]), self.variable_dtype)
        start, end = tf.unstack(scores, axis=-1)  # [B, T] twice
        loss = None
        if starts is not None:
            loss = losses.question_answering_loss(start, end, starts, ends)
        record = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **_rest(out)
        )
        return self._answer(record, return_dict)

    def loss_of(
        self,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        weights: Mapping[str, Any],
    ) -> Tensor:
        """The mean of the cross-entropies of start and end, weighted by rows."""
        return losses.question_answering_loss(
            outputs["start_logits"],
            outputs["end_logits"],
            tf.convert_to_tensor(labels["start_logits"]),
            tf.convert_to_tensor(labels["end_logits"]),
            inputs.tensor(weights["start_logits"]),
            inputs.tensor(weights["end_logits"]),
        )


def _given(option: bool | None, default: bool) -> bool:
    return default if option is None else option


def _rest(out: Mapping[str, Any]) -> dict[str, Any]:
    """What a head passes on of the base model's output."""
    return {name: value for name, value in out.items() if name != "last_hidden_state"}


def _last_real(
    input_ids: Tensor | None, mask: Tensor | None, hidden: Tensor, pad_token_id: int | None
) -> Tensor:
    """The place of each row's last real token, int `[B]`; 0 in a row that has none."""
    B, T = size(hidden, 0), size(hidden, 1)
    if mask is not None:
        real = mask[:, -T:] != tf.zeros((), mask.dtype)
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    elif input_ids is not None and B != 1:
        raise unknown_ends(B)
    else:
        return tf.fill([B], T - 1)
    return tf.reduce_max(tf.where(real, tf.range(T), 0), axis=1)
