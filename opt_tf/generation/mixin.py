"""`generate`, `stream` and `warmup` of a model with a decoder and scores of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from opt_core import arguments
from opt_core.generation import (
    Call,
    GenerationConfig,
    Strategy,
    Streamer,
    check_chunk,
    receiver,
)
from opt_core.outputs import GenerateOutput
from opt_tf.generation.assisted import Assisted
from opt_tf.generation.beams import Beams
from opt_tf.generation.collecting import newest, record, sequences
from opt_tf.generation.constrained import Constrained
from opt_tf.generation.contrastive import Contrastive
from opt_tf.generation.decoding import Plain
from opt_tf.generation.setup import Setup, settle

_RUNS = {
    Strategy.GREEDY: Plain,
    Strategy.SAMPLING: Plain,
    Strategy.BEAMS: Beams,
    Strategy.CONSTRAINED: Constrained,
    Strategy.CONTRASTIVE: Contrastive,
    Strategy.ASSISTED: Assisted,
}


class GenerationMixin:
    """`generate`, `stream` and `warmup` for a model with a decoder and scores of its tokens."""

    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        past_key_values: Any = None,
        logits_processor: Sequence[Callable[..., Any]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[..., Any] | None = None,
        assistant_model: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        streamer: Streamer | Callable[[Tensor], None] | None = None,
        tokenizer: Any = None,
        compiled: bool = True,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue every row: `[B, P]` int -> `[R, P + n]`, the prompt included.

        Options are those of `GenerationConfig`; what is not given comes from `generation_config`,
        else from the model's own. Padding may be on either side and changes nothing. New tokens
        come after column P; a row that has chosen a stop token is filled with the pad id. Without
        `input_ids` every text starts with the bos token. `past_key_values` of an earlier call hold
        the first columns of `input_ids`, which are not fed again; the mask covers all of them.

        `streamer` is called with the tokens `[B]` of each step. With a `tokenizer`, ids that it
        does not know are never chosen; `stop_strings` need one. An `assistant_model`, smaller and
        with the same tokens, guesses what comes: the result is the same, only sooner.

        The shapes are those of `Plan`, so that XLA's programs serve every text of about the same
        length; `compiled=False` leaves XLA out, for debugging or a device without it. With
        `return_dict_in_generate` the result is a record.

        A function of a call that takes `cur_len` becomes a part of the program: it gets whole
        buffers, int32 `[N, W]` (`[W]` for `prefix_allowed_tokens_fn`), of which `cur_len` columns
        are settled, and float32 scores `[N, V]`. A logits processor is `(input_ids, scores,
        cur_len) -> [N, V]`, a stopping criterion `(input_ids, scores, cur_len) -> bool [] or [N]`,
        `prefix_allowed_tokens_fn` `(batch_id, input_ids, cur_len) -> bool [V]`. One without
        `cur_len`, which gets the settled columns alone, or one that cannot be traced, runs in
        Python between the compiled passes, with the same result: `(input_ids, scores)` and
        `(batch_id, input_ids) -> list of ids`. With beams N counts beams, and a criterion sees
        their candidates.

        Raises:
            ValueError: a bad option or prompt, no room for the tokens asked for (before anything
                is computed), scores that are NaN, no token that may be chosen, a function that
                gives another shape, or a call inside `tf.function`.
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
        return _generated(settle(self, call, options, compiled=compiled), streamer)

    def stream(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        compiled: bool = True,
        chunk: int = 1,
        **given: Any,
    ) -> Iterator[Tensor]:
        """As `generate`, but an iterator over the tokens `[B]` of each step.

        The other arguments are those of `generate`, but for a streamer. One call of a program
        chooses `chunk` tokens: more of them cost less, and come later.

        Raises:
            ValueError: as `generate`; with beams, which settle at the end, with drafts for several
                rows, which run one after the other, and with a chunk of less than one token.
        """
        check_chunk(chunk)
        call = Call.taken(given, input_ids=input_ids, generation_config=generation_config)
        setup = settle(self, call, given, compiled=compiled)
        _check_streamed(setup)
        return _streamed(setup, chunk)

    def warmup(
        self, batch_size: int = 1, prompt_length: int = 8, *, compiled: bool = True, **given: Any
    ) -> None:
        """Compile the programs that `generate` runs for such prompts.

        The other arguments are those of `generate`. Functions are called with texts of token 0; one
        that cannot be traced as in `generate`.
        """
        ids = tf.zeros((batch_size, prompt_length), tf.int32)
        given = {"attention_mask": tf.ones_like(ids), **given, "input_ids": ids}
        setup = settle(self, Call.taken(given), given, compiled=compiled)
        _RUNS[setup.strategy](setup).warm()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **inputs: Any
    ) -> dict[str, Any]:
        """The arguments of the next call in a decoding loop of one's own."""
        if past_key_values is not None and len(past_key_values):
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, **inputs}


def _generated(
    setup: Setup, streamer: Streamer | Callable[[Tensor], None] | None
) -> Tensor | GenerateOutput:
    run = _RUNS[setup.strategy](setup)
    seen = []
    if streamer is None and not setup.made.collects:
        carried = run.last()
    else:
        if streamer is not None:
            _check_streamed(setup)
        put, end = receiver(streamer, setup.prompt, lambda tokens: tokens.numpy())
        start = setup.plan.prompt_length
        for carried in run.steps():
            seen.append(carried.seen)
            for tokens in () if streamer is None else newest(setup, carried, start):
                put(tokens)
                start += 1
        end()
    found = run.found(carried)
    if setup.asked.return_dict_in_generate:
        return record(setup, found, seen if setup.made.collects else [])
    return sequences(setup, found)


def _streamed(setup: Setup, chunk: int) -> Iterator[Tensor]:
    start = setup.plan.prompt_length
    for carried in _RUNS[setup.strategy](setup).steps(chunk):
        for tokens in newest(setup, carried, start):
            yield tokens
            start += 1


def _check_streamed(setup: Setup) -> None:
    if setup.asked.num_beams > 1:
        raise arguments.beams_settle_late()
    if setup.strategy is Strategy.ASSISTED and len(setup.prompt) > 1:
        raise arguments.one_row_at_a_time(len(setup.prompt))
