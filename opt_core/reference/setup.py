"""What one generation by the reference is given: checked, and brought to texts without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_core.generation import (
    GenerationConfig,
    Plan,
    check_assistant,
    check_negative_prompt,
    plan,
)
from opt_core.generation.stops import Spells
from opt_core.reference.heads import output_embedding
from opt_core.reference.inputs import Floats, Ints, Mask, token_ids, visible
from opt_core.reference.model import Weights, forward
from opt_core.tokenizer.decoding import bytes_of


class Call(NamedTuple):
    """What a generation may be given besides its options; arrays of NumPy throughout."""

    #: Functions of ids [R, T] and scores [R, V] that give scores [R, V]. The ids are the prompt as
    #: it was given, with its padding, and what was chosen so far.
    logits_processor: Sequence[Callable[[Ints, Floats], Floats]] = ()
    #: Functions of the same, the new token included, that say which texts end: a bool, or bool [R].
    #: With beams the texts are candidates, each with the scores of the beam that it follows.
    stopping_criteria: Sequence[Callable[[Ints, Floats], Any]] = ()
    #: A function of the number of a text and of its ids [T] that gives the tokens that may follow,
    #: as ids or as bool [V].
    prefix_allowed_tokens_fn: Callable[[int, Ints], Any] | None = None
    #: The model that drafts, as its configuration and its weights: it changes no token.
    assistant: tuple[OPTConfig, Weights] | None = None
    #: What guidance leads away from, int [B, Q] and its mask, in place of the last token alone.
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    #: How tokens are spelled, for `stop_strings`.
    tokenizer: Spells | None = None


@dataclass(frozen=True)
class Run:
    """Everything that is settled before the first token is chosen."""

    config: OPTConfig
    weights: Weights
    asked: GenerationConfig
    planned: Plan
    call: Call
    #: Ids from here on are never chosen.
    known: int
    #: int64 [R, P], as given.
    prompt: Ints
    #: The same without padding: what the model is fed and what the rules see.
    texts: list[list[int]]
    #: What guidance leads away from: the texts without their prompts.
    bare: list[list[int]]

    def repeated(self, count: int) -> Run:
        """Every text so many times in place."""
        return replace(
            self,
            prompt=self.prompt.repeat(count, axis=0),
            texts=[text for text in self.texts for _ in range(count)],
            bare=[text for text in self.bare for _ in range(count)],
        )

    def hidden(self, text: list[int]) -> Floats:
        """The last hidden states of a text -> [T, E]."""
        passed = forward(self.config, self.weights, input_ids=[text])
        return np.asarray(passed.last_hidden_state[0])

    def logits(self, row: int, new: list[int]) -> Floats:
        """The model's scores of what follows a text and its new tokens -> [V]."""
        return self.head(self.hidden(self.texts[row] + new)[-1])

    def head(self, hidden: Floats) -> Floats:
        """The scores that a hidden state [E] gives -> [V]."""
        return np.asarray(output_embedding(self.config, self.weights) @ hidden)

    def is_ended(self, row: int, new: list[int]) -> bool:
        """Whether the last of the new tokens is a stop token, or they complete a stop string.

        A string may begin in the prompt; one that ends there ends nothing.
        """
        asked = self.asked.stop_strings or []
        strings = [asked] if isinstance(asked, str) else asked
        prompt = self._spelled(self.texts[row]) if strings else b""
        whole = prompt + (self._spelled(new) if strings else b"")
        return new[-1] in self.asked.stops or any(
            whole.find(text, max(0, len(prompt) - len(text) + 1)) >= 0
            for text in (string.encode() for string in strings)
        )

    def _spelled(self, tokens: list[int]) -> bytes:
        tokenizer = self.call.tokenizer
        if tokenizer is None:
            raise arguments.missing_tokenizer()
        spelled = [token for token in tokens if token < len(tokenizer)]
        return b"".join(bytes_of(t or "") for t in tokenizer.convert_ids_to_tokens(spelled))


def settle(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any,
    generation: GenerationConfig | None,
    known: int | None,
    call: Call,
) -> Run:
    """Check what a generation is given.

    Raises:
        ValueError: as `plan` and `forward`, or what `call` holds does not fit the options.
    """
    arguments.check_generation_config(generation)
    arguments.check_functions("logits_processor", call.logits_processor)
    arguments.check_functions("stopping_criteria", call.stopping_criteria)
    asked = generation or GenerationConfig.from_model_config(config)
    check_negative_prompt(asked, call.negative_prompt_ids, call.negative_prompt_attention_mask)
    ids = token_ids(input_ids, config)  # [B, P]
    if attention_mask is None and asked.padding_id is not None:
        attention_mask = ids != asked.padding_id
    texts = _texts(ids, visible(attention_mask, *ids.shape))
    planned = plan(
        asked, config, prompt_length=ids.shape[1], row_lengths=[len(text) for text in texts]
    )
    if call.assistant is not None:
        check_assistant(asked, config.vocab_size, call.assistant[0].vocab_size)
    bare = [text[-1:] for text in texts]
    if call.negative_prompt_ids is not None:
        negative = token_ids(call.negative_prompt_ids, config)  # [B, Q]
        shown = visible(call.negative_prompt_attention_mask, *negative.shape)
        bare = _texts(negative, shown)
    doubles = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    known = config.vocab_size if known is None else known
    return Run(config, doubles, asked, planned, call, known, ids, texts, bare)


def _texts(ids: Ints, mask: Mask) -> list[list[int]]:
    return [row[shown].tolist() for row, shown in zip(ids, mask, strict=True)]
