"""What a generation returns: tokens, and the record with all that was asked to be collected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import GenerationConfig
from opt_core.outputs import GenerateOutput
from opt_tf.generation.decoding import Carried, Found
from opt_tf.generation.setup import Setup


def sequences(setup: Setup, found: Found) -> Tensor:
    """The texts as they were given, and what follows them: `[R, P + n]`."""
    prompts = tf.gather(setup.prompt, found.texts)
    return tf.concat([prompts, tf.cast(found.tokens, prompts.dtype)], axis=1)


def newest(setup: Setup, carried: Carried, start: int) -> Iterator[Tensor]:
    """The tokens `[B]` of each choice from column `start` on."""
    for column in range(start, int(carried.state.length)):
        yield tf.cast(carried.state.tokens[:, column], setup.prompt.dtype)


def record(setup: Setup, found: Found, seen: list[tuple[Tensor, ...]]) -> GenerateOutput:
    """The record of a generation; `seen` has the scores of each step where they are collected."""
    asked, whole = setup.asked, sequences(setup, found)
    logits, scores = zip(*seen, strict=True) if seen else ((), ())
    passed = _passed(setup, whole, found.texts)
    return GenerateOutput(
        sequences=whole,
        sequences_scores=None if found.scores is None else tf.cast(found.scores, tf.float32),
        scores=scores if asked.output_scores else None,
        logits=logits if asked.output_logits else None,
        beam_indices=found.beams,
        attentions=_cut(setup, passed.get("attentions"), whole, of_keys=True),
        hidden_states=_cut(setup, passed.get("hidden_states"), whole, of_keys=False),
        past_key_values=found.cache(),
    )


def _passed(setup: Setup, whole: Tensor, texts: Tensor) -> dict[str, Any]:
    """One pass over the returned sequences, all but their last column."""
    asked: GenerationConfig = setup.asked
    if not (asked.output_attentions or asked.output_hidden_states):
        return {}
    P, columns = setup.prompt.shape[1], whole.shape[1] - 1
    widened, held = setup.plan.prompt_length - P, setup.held
    shown = np.delete(setup.shown[: len(setup.prompt)], np.s_[held : held + widened], axis=1)
    mask = np.ones((whole.shape[0], columns), np.int32)
    mask[:, :P] = shown[texts.numpy(), :P]
    out = setup.model(
        whole[:, :-1],
        attention_mask=tf.constant(mask),
        use_cache=False,
        output_attentions=asked.output_attentions,
        output_hidden_states=asked.output_hidden_states,
        return_dict=True,
    )
    return dict(out)


def _cut(setup: Setup, layers: Any, whole: Tensor, *, of_keys: bool) -> Any:
    """`[R, H, L, L]` or `[R, L, C]` a layer, cut into what each step computed."""
    if layers is None:
        return None
    P, n = setup.prompt.shape[1], whole.shape[1] - setup.prompt.shape[1]
    starts = [setup.held, *range(P, P + n - 1)]
    ends = range(P, P + n)

    def part(layer: Tensor, start: int, end: int) -> Tensor:
        return layer[:, :, start:end, :end] if of_keys else layer[:, start:end]

    return tuple(
        tuple(part(layer, start, end) for layer in layers)
        for start, end in zip(starts, ends, strict=True)
    )
