"""OPT for Flax: Linen modules of the bare model and its heads, and the classes around them."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.arguments import check_both_places, unknown_ends
from opt_core.config import OPTConfig
from opt_core.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from opt_core.weights import Head
from opt_flax.attention import choose
from opt_flax.decoder import Cache, Decoder
from opt_flax.generation import GenerationMixin
from opt_flax.layers import LanguageHead, Part
from opt_flax.models import inputs, losses
from opt_flax.models.base import FlaxOPTPreTrainedModel
from opt_flax.models.inputs import Asked, Given, Training


class OPTPart(Part):
    """What every module of OPT is told; `checkpoint_every` as in `Decoder`."""

    config: OPTConfig
    attn_implementation: str = "xla"
    checkpoint_every: int = 0

    def bare(self) -> FlaxOPTModule:
        """The model without a head, for a module that puts one on it."""
        types = (self.dtype, self.param_dtype)
        return FlaxOPTModule(self.config, *types, self.attn_implementation, self.checkpoint_every)


class FlaxOPTModule(OPTPart):
    """OPT without a head, as a Linen module: tokens in, hidden states out."""

    def setup(self) -> None:
        """Make the decoder."""
        self.decoder = Decoder(self.config, self.dtype, self.param_dtype, self.checkpoint_every)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        deterministic: bool = True,
        *,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        """`[B, T]` ids, or `[B, T, E]` embeddings -> `[B, T, E]` hidden states.

        The arguments are those of `FlaxOPTModel`. A cache comes out if `use_cache` says so; without
        it, if one went in. Training (`deterministic=False`) reads the random stream "dropout", and
        "layerdrop" where it is given and layers are dropped.

        Raises:
            ValueError: an argument of the wrong shape, or of the wrong range where that is known.
        """
        config, past = self.config, Cache.of(past_key_values, self.config.num_hidden_layers)
        given = Given(input_ids, attention_mask, position_ids, inputs_embeds, head_mask, past)
        given = inputs.check(config, given)
        room = inputs.room_for(past, given.tokens.shape[1])
        keeps = past is not None if use_cache is None else use_cache
        call = inputs.resolve(
            config,
            inputs.fitted(given, room),
            capacity=room if keeps else None,
            dtype=self.dtype,
        )
        embeds = given.inputs_embeds
        if embeds is None:
            embeds = self.decoder.embed_tokens(jnp.asarray(given.input_ids))
        attend = choose(
            self.attn_implementation,
            call.visible,
            dropout=0.0 if deterministic else config.attention_dropout,
            weights=output_attentions,
            dtype=self.dtype,
            platform=jax.default_backend(),
        )
        out = self.decoder(
            jnp.asarray(embeds, self.dtype),
            call.positions,
            attend,
            call.cache,
            call.head_mask,
            output_hidden_states,
            deterministic,
        )
        result = BaseModelOutputWithPast(
            last_hidden_state=out.last,
            past_key_values=out.cache if keeps else None,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if return_dict else result.to_tuple()


class FlaxOPTForCausalLMModule(OPTPart):
    """OPT with its language-model head, as a Linen module."""

    def setup(self) -> None:
        """Make the model and its head."""
        self.model = self.bare()
        self.lm_head = LanguageHead(self.config, self.dtype, self.param_dtype)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        deterministic: bool = True,
        *,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Any = None,
    ) -> Any:
        """As `FlaxOPTModule`, but `[B, T, V]` logits; with `[B, T]` labels also the loss.

        Raises:
            ValueError: as `FlaxOPTModule`, or labels of the wrong shape.
        """
        options = (output_attentions, output_hidden_states, True, deterministic)
        out = self.model(
            *(input_ids, attention_mask, position_ids, *options),
            inputs_embeds=inputs_embeds,
            head_mask=head_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        tied = self.config.tie_word_embeddings
        table = self.model.decoder.embed_tokens.embedding if tied else None
        logits = self.lm_head(out.last_hidden_state, table)  # [B, T, V]
        loss = None if labels is None else losses.causal_lm_loss(logits, labels)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **_rest(out))
        return result if return_dict else result.to_tuple()


class FlaxOPTForSequenceClassificationModule(OPTPart):
    """OPT with a linear head on the last real token of every row, as a Linen module."""

    def setup(self) -> None:
        """Make the model and its head."""
        self.model = self.bare()
        self.score = self.linear(self.config.num_labels, bias=False)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        deterministic: bool = True,
        *,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Any = None,
    ) -> Any:
        """As `FlaxOPTModule`, but `[B, num_labels]` logits of each row's last real token.

        Raises:
            ValueError: as `FlaxOPTModule`; labels that do not fit; or several rows of ids with
                neither a mask nor a padding id.
        """
        past = Cache.of(past_key_values, self.config.num_hidden_layers)
        given = Given(input_ids, attention_mask, position_ids, inputs_embeds, head_mask, past)
        given = inputs.check(self.config, given, keeps_mask=True)
        out = self.model(
            *(*given[:3], output_attentions, output_hidden_states, True, deterministic),
            inputs_embeds=given.inputs_embeds,
            head_mask=given.head_mask,
            past_key_values=past,
            use_cache=use_cache,
        )
        places = _last_real(given, self.config.pad_token_id)[:, None, None]
        last = jnp.take_along_axis(out.last_hidden_state, places, axis=1)[:, 0]  # [B, E]
        logits = self.score(last)  # [B, num_labels]
        loss = None
        if labels is not None:
            loss = losses.classification_loss(logits, labels, self.config)
        result = SequenceClassifierOutputWithPast(loss=loss, logits=logits, **_rest(out))
        return result if return_dict else result.to_tuple()


class FlaxOPTForQuestionAnsweringModule(OPTPart):
    """OPT with a head that scores where an answer starts and ends, as a Linen module."""

    def setup(self) -> None:
        """Make the model and its head."""
        self.model = self.bare()
        self.qa_outputs = self.linear(2, bias=True)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        deterministic: bool = True,
        *,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        start_positions: Any = None,
        end_positions: Any = None,
    ) -> Any:
        """As `FlaxOPTModule`, but `[B, T]` start and end logits; with `[B]` places also the loss.

        Raises:
            ValueError: as `FlaxOPTModule`, or only one of the two places was given.
        """
        check_both_places(start_positions is not None, end_positions is not None)
        options = (output_attentions, output_hidden_states, True, deterministic)
        out = self.model(
            *(input_ids, attention_mask, position_ids, *options),
            inputs_embeds=inputs_embeds,
            head_mask=head_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        scores = self.qa_outputs(out.last_hidden_state)  # [B, T, 2]
        start, end = scores[..., 0], scores[..., 1]  # [B, T] twice
        loss = None
        if start_positions is not None:
            loss = losses.question_answering_loss(start, end, start_positions, end_positions)
        result = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **_rest(out)
        )
        return result if return_dict else result.to_tuple()


def _rest(out: ModelOutput) -> dict[str, Any]:
    """What a head passes on of the base model's output."""
    return {name: out[name] for name in out if name != "last_hidden_state"}


def _last_real(given: Given, pad_token_id: int | None) -> Array:
    """The place of each row's last real token, int `[B]`; 0 in a row that has none."""
    B, T = given.tokens.shape[:2]
    shown = inputs.shown_now(given)
    if shown is None and given.input_ids is not None:
        if pad_token_id is not None:
            shown = jnp.asarray(given.input_ids) != pad_token_id
        elif B > 1:
            raise unknown_ends(B)
    places = jnp.arange(T, dtype=jnp.int32)[None]
    return jnp.where(True if shown is None else shown, places, 0).max(1) + jnp.zeros(B, jnp.int32)


class FlaxOPTModel(FlaxOPTPreTrainedModel):
    """OPT without a head: tokens in, hidden states out."""

    head = Head.NONE
    module_class: ClassVar[Any] = FlaxOPTModule


class _Labelled(FlaxOPTPreTrainedModel):
    """A class whose loss is that of labels."""

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool | None = None,
        *,
        train: bool | None = None,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        use_cache: bool | None = None,
        labels: Any = None,
    ) -> Any:
        """As `FlaxOPTModel`, but logits; with labels also the loss.

        Raises:
            ValueError: as `FlaxOPTModel`, or labels that do not fit.
        """
        targets = {}
        if labels is not None:
            targets["labels"] = inputs.as_array(labels)
            losses.check_labels(self.config, targets["labels"], self.head)
        return self._call(
            Given(input_ids, attention_mask, position_ids, inputs_embeds, head_mask),
            past_key_values,
            targets,
            params,
            Asked(output_attentions, output_hidden_states, return_dict, use_cache),
            Training(dropout_rng, deterministic, train),
        )


class FlaxOPTForCausalLM(GenerationMixin, _Labelled):
    """OPT with its language-model head: `[B, T, V]` scores of every next token, and `generate`.

    The loss is the mean cross-entropy of each next token of `[B, T]` labels; -100 does not count.
    """

    head = Head.CAUSAL_LM
    module_class: ClassVar[Any] = FlaxOPTForCausalLMModule


class FlaxOPTForSequenceClassification(_Labelled):
    """OPT with a linear head on the last real token of every row: `[B, num_labels]` logits.

    That is the last place that the mask shows; without a mask the last id that is not the padding
    id; with embeddings alone the last place.
    """

    head = Head.SEQUENCE_CLASSIFICATION
    module_class: ClassVar[Any] = FlaxOPTForSequenceClassificationModule


class FlaxOPTForQuestionAnswering(FlaxOPTPreTrainedModel):
    """OPT with a head that scores where an answer starts and ends: `[B, T]` logits twice."""

    head = Head.QUESTION_ANSWERING
    module_class: ClassVar[Any] = FlaxOPTForQuestionAnsweringModule

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool | None = None,
        *,
        train: bool | None = None,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        use_cache: bool | None = None,
        start_positions: Any = None,
        end_positions: Any = None,
    ) -> Any:
        """As `FlaxOPTModel`, but logits; with `[B]` places of answers also the loss.

        Raises:
            ValueError: as `FlaxOPTModel`, or only one of the two places was given.
        """
        places = {"start_positions": start_positions, "end_positions": end_positions}
        return self._call(
            Given(input_ids, attention_mask, position_ids, inputs_embeds, head_mask),
            past_key_values,
            {name: inputs.as_array(x) for name, x in places.items() if x is not None},
            params,
            Asked(output_attentions, output_hidden_states, return_dict, use_cache),
            Training(dropout_rng, deterministic, train),
        )
