"""OPT for PyTorch: the bare model and its three heads, called as in Hugging Face transformers."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from opt_core.arguments import check_both_places, unknown_ends
from opt_core.config import OPTConfig
from opt_core.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from opt_core.weights import EMBEDDING_NAME, LM_HEAD_NAME, Head
from opt_torch.attention import choose
from opt_torch.decoder import Cache, Decoder, DecoderLayer
from opt_torch.generation import GenerationMixin
from opt_torch.linear import linear
from opt_torch.models import inputs, losses
from opt_torch.models.base import OPTPreTrainedModel


class OPTDecoderLayer(DecoderLayer):
    """One layer of OPT: the unit that is never split over devices (FSDP and accelerate ask)."""


class OPTDecoder(Decoder):
    """The stack of OPT's layers with its embeddings."""

    layer_class = OPTDecoderLayer


class OPTModel(OPTPreTrainedModel):
    """OPT without a head: tokens in, hidden states out."""

    head = Head.NONE

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation=attn_implementation)
        self.decoder = OPTDecoder(self.config)
        self._finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """`[B, T]` ids, or `[B, T, E]` embeddings -> `[B, T, E]` hidden states.

        `attention_mask` is 0 or 1, `[B, past + T]`; without it everything counts. `position_ids`
        start at 0 and come from the mask unless given. `head_mask` is `[L, H]` or `[H]`: a factor
        for each head. `past_key_values` is what an earlier call returned, or pairs per layer.

        Raises:
            ValueError: an argument of the wrong shape or range, or a call that the chosen
                attention implementation cannot run.
        """
        config = self.config
        caching = self._caches(use_cache)
        wants_weights = _given(output_attentions, config.output_attentions)
        tokens = inputs.check_tokens(config, input_ids, inputs_embeds)
        call = inputs.resolve(
            config,
            tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            past=Cache.of(past_key_values, config.num_hidden_layers),
            caching=caching,
        )
        embeds = tokens if input_ids is None else self.decoder.embed_tokens(tokens)
        attend = choose(
            self.attn_implementation,
            call.visible,
            dropout=config.attention_dropout if self.training else 0.0,
            weights=wants_weights,
            dtype=embeds.dtype,
            device=embeds.device,
        )
        out = self.decoder(
            embeds,
            call.positions,
            attend,
            call.cache,
            call.head_mask,
            _given(output_hidden_states, config.output_hidden_states),
        )
        result = BaseModelOutputWithPast(
            last_hidden_state=out.last,
            past_key_values=call.cache if caching else None,
            hidden_states=out.hidden_states,
            attentions=out.attentions if wants_weights else None,
        )
        return result if _given(return_dict, config.return_dict) else result.to_tuple()

    def _caches(self, use_cache: bool | None) -> bool:
        """Whether this call returns a cache: never where layers are run again or left out."""
        unsteady = self.decoder.checkpoint_every > 0 or self.config.layerdrop > 0
        if not (self.training and unsteady):
            return _given(use_cache, self.config.use_cache)
        if use_cache:
            warnings.warn(
                "use_cache is off while training with gradient checkpointing or layerdrop",
                stacklevel=3,
            )
        return False


class OPTForCausalLM(GenerationMixin, OPTPreTrainedModel):
    """OPT with its language-model head: the scores of every next token, and `generate`."""

    head = Head.CAUSAL_LM

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(self.config)
        self.lm_head = nn.Linear(config.word_embed_proj_dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self._tied_weights_keys = {LM_HEAD_NAME: EMBEDDING_NAME}
            # One name for one tensor: writers of safetensors refuse two.
            self.register_state_dict_post_hook(_leave_out_tied_head)
            self.register_load_state_dict_pre_hook(_put_back_tied_head)
        self._finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As `OPTModel`, but `[B, T, V]` logits; with `[B, T]` labels also the loss.

        The loss is the mean cross-entropy of each next token; labels of -100 do not count.

        Raises:
            ValueError: as `OPTModel`, or labels of the wrong shape or range.
        """
        out = self.model(
            input_ids,
            attention_mask,
            head_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            position_ids=position_ids,
        )
        logits = linear(self.lm_head, out.last_hidden_state)  # [B, T, V]
        loss = None if labels is None else losses.causal_lm_loss(logits, labels)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **_rest(out))
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()


class OPTForSequenceClassification(OPTPreTrainedModel):
    """OPT with a linear head on the last real token of every row."""

    head = Head.SEQUENCE_CLASSIFICATION

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(self.config)
        self.score = nn.Linear(config.word_embed_proj_dim, config.num_labels, bias=False)
        self._finish()

    @property
    def num_labels(self) -> int:
        """How many classes the head tells apart."""
        return self.config.num_labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """As `OPTModel`, but `[B, num_labels]` logits of each row's last real token.

        That is the last place that the mask shows; without a mask the last id that is not the
        padding id; with embeddings alone the last place.

        Raises:
            ValueError: as `OPTModel`; labels that do not fit; or several rows of ids with neither a
                mask nor a padding id.
        """
        out = self.model(
            input_ids,
            attention_mask,
            head_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            position_ids=position_ids,
        )
        hidden = out.last_hidden_state  # [B, T, E]
        places = _last_real(input_ids, attention_mask, hidden, self.config.pad_token_id)
        rows = torch.arange(len(hidden), device=hidden.device)
        logits = self.score(hidden[rows, places])  # [B, num_labels]
        loss = None
        if labels is not None:
            loss = losses.classification_loss(logits, labels, self.config)
        result = SequenceClassifierOutputWithPast(loss=loss, logits=logits, **_rest(out))
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()


class OPTForQuestionAnswering(OPTPreTrainedModel):
    """OPT with a head that scores where an answer starts and ends."""

    head = Head.QUESTION_ANSWERING

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(self.config)
        self.qa_outputs = nn.Linear(config.word_embed_proj_dim, 2)
        self._finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """As `OPTModel`, but `[B, T]` start and end logits; with `[B]` places also the loss.

        Raises:
            ValueError: as `OPTModel`, or only one of the two places was given.
        """
        check_both_places(start_positions is not None, end_positions is not None)
        out = self.model(
            input_ids,
            attention_mask,
            head_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            position_ids=position_ids,
        )
        scores = self.qa_outputs(out.last_hidden_state)  # [B, T, 2]
        # Tensors of their own: FSDP2 warns of outputs that are views.
        start, end = (part.clone() for part in scores.unbind(-1))  # [B, T] twice
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = losses.question_answering_loss(start, end, start_positions, end_positions)
        result = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **_rest(out)
        )
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()


def _given(option: bool | None, default: bool) -> bool:
    return default if option is None else option


def _rest(out: ModelOutput) -> dict[str, Any]:
    """What a head passes on of the base model's output."""
    return {name: out[name] for name in out if name != "last_hidden_state"}


def _last_real(
    input_ids: Tensor | None, mask: Tensor | None, hidden: Tensor, pad_token_id: int | None
) -> Tensor:
    """The place of each row's last real token, int `[B]`; 0 in a row that has none."""
    B, T = hidden.shape[:2]
    if mask is not None:
        real = mask[:, -T:] != 0
    elif input_ids is None:
        return torch.full((B,), T - 1, device=hidden.device)
    elif pad_token_id is not None:
        real = input_ids != pad_token_id
    elif B == 1:
        return torch.full((B,), T - 1, device=hidden.device)
    else:
        raise unknown_ends(B)
    places = torch.arange(T, device=hidden.device)
    return torch.where(real.to(hidden.device), places, 0).amax(1)


def _leave_out_tied_head(_model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(prefix + LM_HEAD_NAME, None)


def _put_back_tied_head(_model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    embedding = state.get(prefix + EMBEDDING_NAME)
    if embedding is not None:
        state.setdefault(prefix + LM_HEAD_NAME, embedding)


def _from_tree(kind: type[ModelOutput], values: Any, names: list[str]) -> ModelOutput:
    return kind(zip(names, values, strict=True))


for _record in (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
):
    # FSDP, DDP and export find the tensors of an output through PyTorch's tree registry.
    register_pytree_node(
        _record,
        lambda out: (list(out.values()), list(out)),
        partial(_from_tree, _record),
        serialized_type_name=f"optlm.{_record.__name__}",
    )
