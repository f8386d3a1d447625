"""What a call of `generate` is given besides its options, and what can be said of it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from opt_core import arguments
from opt_core.generation.configuration import GenerationConfig, Strategy
from opt_core.generation.stops import StopTable


class Call(NamedTuple):
    """The arguments of `generate`, by their names there; arrays are those of a framework."""

    input_ids: Any = None
    generation_config: GenerationConfig | None = None
    attention_mask: Any = None
    past_key_values: Any = None
    logits_processor: Sequence[Callable[..., Any]] | None = None
    stopping_criteria: Sequence[Callable[..., Any]] | None = None
    prefix_allowed_tokens_fn: Callable[..., Any] | None = None
    assistant_model: Any = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    tokenizer: Any = None

    @classmethod
    def taken(cls, given: dict[str, Any], **others: Any) -> Call:
        """Take the arguments out of what is given by name; what is left are options."""
        return cls(**others, **{name: given.pop(name) for name in cls._fields if name in given})

    def settled(self, own: GenerationConfig, options: Mapping[str, Any]) -> GenerationConfig:
        """The options: those given, then those of the call's configuration, or of the model's own.

        Raises:
            ValueError: a bad option, functions that are none, a negative prompt without guidance.
        """
        arguments.check_generation_config(self.generation_config)
        arguments.check_functions("logits_processor", self.logits_processor)
        arguments.check_functions("stopping_criteria", self.stopping_criteria)
        allowed = self.prefix_allowed_tokens_fn
        if allowed is not None and not callable(allowed):
            raise ValueError(
                f"prefix_allowed_tokens_fn is {type(allowed).__name__}; give a function of a row's "
                "place in the batch and its ids, which returns the ids that may follow"
            )
        asked = (self.generation_config or own).merged(**options)
        check_negative_prompt(asked, self.negative_prompt_ids, self.negative_prompt_attention_mask)
        return asked

    def strategy(self, asked: GenerationConfig, vocab_size: int) -> Strategy:
        """How tokens are chosen.

        Raises:
            ValueError: the assistant cannot draft for it.
        """
        if self.assistant_model is None:
            return asked.strategy
        drafted = getattr(getattr(self.assistant_model, "config", None), "vocab_size", None)
        if drafted is None:
            raise ValueError(
                f"assistant_model is {type(self.assistant_model).__name__}; give a model of this "
                "framework for causal language modelling"
            )
        check_assistant(asked, vocab_size, drafted)
        return Strategy.ASSISTED

    def drafts(self, asked: GenerationConfig) -> int:
        """How many tokens are guessed before each pass; 0 where nobody drafts."""
        guessed = asked.num_assistant_tokens if self.assistant_model is not None else 0
        return asked.prompt_lookup_num_tokens or guessed

    def known_tokens(self, vocab_size: int) -> int:
        """How many ids there are that may be chosen: with a tokenizer, those that it knows."""
        return vocab_size if self.tokenizer is None else min(vocab_size, len(self.tokenizer))

    def stop_table(self, asked: GenerationConfig, vocab_size: int) -> StopTable | None:
        """The table of the stop strings, if there are any.

        Raises:
            ValueError: there is no tokenizer that spells tokens.
        """
        strings = asked.stop_strings
        if not strings:
            return None
        if self.tokenizer is None:
            raise arguments.missing_tokenizer()
        strings = [strings] if isinstance(strings, str) else strings
        return StopTable.of(strings, self.tokenizer, vocab_size)


def check_negative_prompt(asked: GenerationConfig, ids: Any, mask: Any) -> None:
    """See that a negative prompt has a use.

    Raises:
        ValueError: nothing is guided by it, or only its mask is given.
    """
    if (ids is not None and not asked.is_guided) or (mask is not None and ids is None):
        raise arguments.unused_negative_prompt()


def check_assistant(asked: GenerationConfig, vocab_size: int, drafted: int) -> None:
    """See that a model of `drafted` tokens may draft for one of `vocab_size`.

    Raises:
        ValueError: it may not; says what does not go together.
    """
    arguments.check_assistant(asked.strategy.value, vocab_size, drafted)
    if asked.is_guided:
        raise arguments.assistant_needs("guidance_scale", "1.0")
    if not asked.use_cache:
        raise arguments.assistant_needs("use_cache", "True")


def check_goes_on(asked: GenerationConfig) -> None:
    """See that a cache of an earlier call is all that is needed of the text before.

    Raises:
        ValueError: an option needs hidden states, other rows, or all tokens again.
    """
    for option, needs_more in (
        ("penalty_alpha", asked.strategy is Strategy.CONTRASTIVE),
        ("guidance_scale", asked.is_guided),
        ("use_cache=False", not asked.use_cache),
    ):
        if needs_more:
            raise arguments.past_without(option)
