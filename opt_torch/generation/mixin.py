"""`generate`, `stream` and `warmup` for a model with `model.decoder` and `lm_head`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opt_core import arguments
from opt_core.generation import Call, GenerationConfig, Strategy, Streamer, receiver
from opt_core.outputs import GenerateOutput
from opt_torch.generation import assisted, beams, constrained, contrastive, decoding
from opt_torch.generation.collecting import Found, Notes, record, sequences
from opt_torch.generation.decoding import State
from opt_torch.generation.setup import Run, settle

#: What is settled token by token.
_STATES: dict[Strategy, Callable[[Run, Notes], Iterator[State]]] = {
    Strategy.GREEDY: decoding.states,
    Strategy.SAMPLING: decoding.states,
    Strategy.CONTRASTIVE: contrastive.states,
    Strategy.ASSISTED: assisted.states,
}
#: What is settled at the end.
_SEARCHES: dict[Strategy, Callable[[Run, Notes], Found]] = {
    Strategy.BEAMS: beams.search,
    Strategy.CONSTRAINED: constrained.search,
}


class GenerationMixin:
    """`generate` and its like, for every strategy of `GenerationConfig`."""

    generation_config: GenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None,
        assistant_model: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        streamer: Streamer | Callable[[Tensor], None] | None = None,
        tokenizer: Any = None,
        compiled: bool | str = False,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue every row: `[B, P]` int -> `[R, P + n]`, the prompt included.

        Options are those of `GenerationConfig`; what is not given comes from `generation_config`,
        else from the model's own. Padding may be on either side and changes nothing. New tokens
        come after column P; a row that has ended is filled with the pad id. Without `input_ids`
        every text starts with the bos token.

        `past_key_values` of an earlier call hold the first columns of `input_ids`, which are not
        fed again. Each `logits_processor` is called with int `[B, P + n]` and float `[B, V]`, and
        returns the latter changed; each of the `stopping_criteria` with the same, and returns a
        bool, or one for each row; `prefix_allowed_tokens_fn` with a row's place in the batch and
        its text, and returns the ids that may follow, or bool `[V]`. With beams criteria see every
        candidate, and the scores of the beam that it follows. Those of transformers work. An
        `assistant_model` of the same vocabulary drafts, which changes the speed and no token;
        beside functions, which may look at several rows together, nobody drafts.
        Under `guidance_scale` the text is compared with what `negative_prompt_ids` would go on
        with, or else with what its last token alone would.

        `streamer` is called with the tokens `[B]` of each step. With a `tokenizer`, ids that it
        does not know are never chosen; `stop_strings` need one. `compiled` runs each step through
        `torch.compile` (True, or the name of a backend): its shapes are those of `Plan`, so one
        program serves every text of about the same length. With `return_dict_in_generate` the
        result is a record, see `GenerateOutput`. A model in training generates as in evaluation.

        Raises:
            ValueError: a bad option or argument, no room for the tokens asked for (before
                anything is computed), scores that are NaN, or no token that may be chosen.
        """
        call = Call(
            input_ids,
            generation_config,
            attention_mask,
            past_key_values,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            assistant_model,
            negative_prompt_ids,
            negative_prompt_attention_mask,
            tokenizer,
        )
        run = _compiled(settle(self, call, options), compiled)
        notes = Notes.of(run)
        found = _found(run, notes, streamer)
        if run.asked.return_dict_in_generate:
            return record(run, found, notes)
        return sequences(run, found)

    def stream(
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        compiled: bool | str = False,
        **given: Any,
    ) -> Iterator[Tensor]:
        """As `generate`, but an iterator over the tokens `[B]` of each step.

        The other arguments are those of `generate`, but for a streamer.

        Raises:
            ValueError: as `generate`, before the first token; beams were asked for, which settle at
                the end, or assisted decoding of several rows, which run one after the other.
        """
        call = Call.taken(given, input_ids=input_ids, generation_config=generation_config)
        with torch.no_grad():
            run = _compiled(settle(self, call, given), compiled)
        _check_streamed(run)
        return _newest_tokens(_STATES[run.strategy](run, Notes()))

    @torch.no_grad()
    def warmup(
        self,
        batch_size: int = 1,
        prompt_length: int = 8,
        *,
        compiled: bool | str = False,
        **given: Any,
    ) -> None:
        """Pack and compile what calls of this size need, before the first.

        The other arguments are those of `generate`.

        Raises:
            ValueError: as `generate`.
        """
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        ids = torch.zeros(batch_size, prompt_length, dtype=torch.long, device=device)
        given = {"attention_mask": torch.ones_like(ids), **given, "input_ids": ids}
        run = _compiled(settle(self, Call.taken(given), given), compiled)
        # Two steps run all there is; nothing of them is kept.
        plan = run.plan._replace(max_new_tokens=min(3, run.plan.max_new_tokens))
        _found(run._replace(plan=plan), Notes(), None)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **inputs: Any
    ) -> dict[str, Any]:
        """The arguments of the next call in a decoding loop of one's own (PEFT asks for it)."""
        if past_key_values is not None and len(past_key_values):
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, **inputs}


def _compiled(run: Run, how: bool | str) -> Run:
    """The same run with its steps compiled, if that is asked for.

    Raises:
        ValueError: its shapes are not fixed.
    """
    if not how:
        return run
    if not run.asked.use_cache:
        raise ValueError("compiled steps need the cache: leave use_cache at True")
    if run.strategy is Strategy.ASSISTED:
        raise ValueError("compiled steps are of one size, drafts are not: leave compiled at False")
    backend = "inductor" if how is True else how
    return run._replace(packed=None, program=decoding.compiled(backend))


def _check_streamed(run: Run) -> None:
    if run.strategy not in _STATES:
        raise arguments.beams_settle_late()
    if run.strategy is Strategy.ASSISTED and len(run.prompt.text) > 1:
        raise arguments.one_row_at_a_time(len(run.prompt.text))


def _found(run: Run, notes: Notes, streamer: Streamer | Callable[[Tensor], None] | None) -> Found:
    """What the strategy of a run finds, told step by step to a streamer."""
    if streamer is not None:
        _check_streamed(run)
    if run.strategy in _SEARCHES:
        return _SEARCHES[run.strategy](run, notes)
    if run.strategy is Strategy.ASSISTED and len(run.prompt.text) > 1:
        return assisted.rows(run, notes)
    put, end = receiver(streamer, run.prompt.given.clone(), Tensor.cpu)
    state = None
    for state in _STATES[run.strategy](run, notes):
        put(_newest(state))
    end()
    assert state is not None
    cache = state.cache.counted()
    # Contrastive search has fed the newest token already.
    cache.length = min(cache.get_seq_length(), int(state.length) - 1)
    return Found(state.tokens[:, run.plan.prompt_length : state.length], cache)


def _newest_tokens(states: Iterator[State]) -> Iterator[Tensor]:
    while True:
        # Not around the loop: between two tokens the caller's own code runs.
        with torch.no_grad():
            state = next(states, None)
        if state is None:
            return
        yield _newest(state)


def _newest(state: State) -> Tensor:
    """The tokens `[B]` of the last step; a copy, since whoever gets them may write into them."""
    return state.tokens[:, state.length - 1].clone()
