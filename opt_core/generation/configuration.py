"""The options of one generation: validated, merged with those of a call, read from files."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from opt_core.config.files import read_json
from opt_core.generation.options import NEUTRAL, OPTIONS, nearest, plain, refuse_unhonoured

GENERATION_FILE = "generation_config.json"

#: Options that ask nothing unless another one does: the names, and what they wait for.
_IDLE = (
    (
        ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        "do_sample=True",
    ),
    (("top_k",), "do_sample=True or penalty_alpha"),
    (("length_penalty", "early_stopping"), "num_beams above 1"),
    (("max_matching_ngram_size",), "prompt_lookup_num_tokens"),
)


class Strategy(Enum):
    """How tokens are chosen. What differs between strategies is one room of `generation` each."""

    GREEDY = "greedy"
    SAMPLING = "sampling"
    BEAMS = "beams"
    CONSTRAINED = "constrained"
    CONTRASTIVE = "contrastive"
    ASSISTED = "assisted"


class HasTokens(Protocol):
    """What is read of a model's configuration to generate without a file of options."""

    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None


class GenerationConfig:
    """What is asked of `generate`: strategy, lengths, rules; validated on every assignment.

    `eos_token_id` None never stops early; a rule that is None (and `top_k` 0) is switched off. What
    every option means stands in `docs/decoding.md`, and exactly in `opt_core.reference`. Keys of a
    `generation_config.json` that nobody here knows are kept and written back. An option of
    transformers that is not honoured raises, unless it holds the value that asks nothing, such as
    `max_time=None`. Options that contradict each other raise when a generation is planned, and
    when they are saved; see `validate`.

    Raises:
        ValueError: a value is not allowed (naming option, value and remedy), or an option is
            unknown (naming the nearest known one) or not honoured.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    sequence_bias: list[tuple[list[int], float]] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    guidance_scale: float | None
    remove_invalid_values: bool
    renormalize_logits: bool
    num_return_sequences: int
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float | None
    length_penalty: float
    early_stopping: bool | str | None
    force_words_ids: list[Any] | None
    penalty_alpha: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    num_assistant_tokens: int
    stop_strings: str | list[str] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    bos_token_id: int | None
    use_cache: bool
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    output_attentions: bool
    output_hidden_states: bool
    seed: int | list[int] | None

    def __init__(self, **options: Any) -> None:
        self.__dict__["_extra"] = {}
        for name, (default, _) in OPTIONS.items():
            self.__dict__[name] = default
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            value = plain(value)
            words, holds, _ = OPTIONS[name][1]
            if not holds(value):
                raise ValueError(f"generation option {name} is {value!r}; it must be {words}")
            self.__dict__[name] = value
        elif name in NEUTRAL:
            refuse_unhonoured(name, value)
            self._extra.pop(name, None)
        elif name.startswith("_") or name in self._extra:
            self._extra[name] = value
        else:
            raise ValueError(f"there is no generation option {name!r}{nearest(name)}")

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("_extra", {})
        if name in extra:
            return extra[name]
        if name in NEUTRAL:
            return NEUTRAL[name][0]
        raise AttributeError(f"there is no generation option {name!r}{nearest(name)}")

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens after which a row is finished; none if it goes on to the full length."""
        stops = self.eos_token_id
        return () if stops is None else tuple(stops) if isinstance(stops, list) else (stops,)

    @property
    def fill(self) -> int:
        """What follows in a row that is finished: the pad id, or else the first stop token."""
        return next((i for i in (self.pad_token_id, *self.stops) if i is not None), 0)

    @property
    def padding_id(self) -> int | None:
        """The id that counts as padding in a prompt without a mask, as in transformers.

        None where no id does: the pad id is not known, or is a stop token too, which a text may
        hold.
        """
        return None if self.pad_token_id in self.stops else self.pad_token_id

    @property
    def strategy(self) -> Strategy:
        """How tokens are chosen; a call with an `assistant_model` is `Strategy.ASSISTED` too."""
        if self.num_beams > 1:
            return Strategy.CONSTRAINED if self.force_words_ids else Strategy.BEAMS
        if self.penalty_alpha:
            return Strategy.CONTRASTIVE
        if self.prompt_lookup_num_tokens:
            return Strategy.ASSISTED
        return Strategy.SAMPLING if self.do_sample else Strategy.GREEDY

    @property
    def candidates(self) -> int:
        """How many candidates a step weighs: of each group of beams, or in contrastive search.

        With beams enough that, whatever stops, a group's number of them goes on.
        """
        if self.num_beams > 1:
            return max(2, 1 + len(self.stops)) * (self.num_beams // self.num_beam_groups)
        return (self.top_k or 1) if self.penalty_alpha else 1

    @property
    def is_guided(self) -> bool:
        """Whether every step is computed with and without the prompt (`guidance_scale`)."""
        return self.guidance_scale not in (None, 1.0)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that the scores of a step pass through, in the order of transformers' chain.

        "min_new_tokens" stands for `min_length` too (see `Plan.min_new_tokens`). The functions of
        a call come in between: `prefix_allowed_tokens_fn` before "forced_bos_token_id", the
        `logits_processor` before "temperature".
        """
        asks_minimum = bool(self.stops) and bool(self.min_length or self.min_new_tokens)
        samples = self.do_sample
        active = {
            "sequence_bias": bool(self.sequence_bias),
            "diversity_penalty": self.num_beam_groups > 1,
            "repetition_penalty": self.repetition_penalty not in (None, 1.0),
            "no_repeat_ngram_size": bool(self.no_repeat_ngram_size),
            "bad_words_ids": bool(self.bad_words_ids),
            "min_new_tokens": asks_minimum,
            "forced_bos_token_id": self.forced_bos_token_id is not None,
            "forced_eos_token_id": self.forced_eos_token_id is not None,
            "remove_invalid_values": self.remove_invalid_values,
            "exponential_decay_length_penalty": bool(
                self.stops and self.exponential_decay_length_penalty
            ),
            "suppress_tokens": bool(self.suppress_tokens),
            "begin_suppress_tokens": bool(self.begin_suppress_tokens),
            "temperature": samples and self.temperature not in (None, 1.0),
            "top_k": samples and bool(self.top_k),
            "top_p": samples and self.top_p is not None and self.top_p < 1.0,
            "min_p": samples and self.min_p is not None,
            "typical_p": samples and self.typical_p is not None and self.typical_p < 1.0,
            "epsilon_cutoff": samples and bool(self.epsilon_cutoff),
            "eta_cutoff": samples and bool(self.eta_cutoff),
            "renormalize_logits": self.renormalize_logits,
        }
        return tuple(name for name, is_active in active.items() if is_active)

    @property
    def waits_for_batch(self) -> bool:
        """Whether texts search on until all are done, as an explicit False says in transformers."""
        return self.early_stopping is False and self.num_beam_groups == 1

    @property
    def kept_tokens(self) -> int:
        """How many tokens every cut leaves at least: with beams enough that one goes on."""
        return 1 + max(1, len(self.stops)) if self.num_beams > 1 else 1

    def validate(self) -> None:
        """Look for options that contradict each other; every contradiction is listed.

        Raises:
            ValueError: there is one; names its options and a way out.
        """
        from opt_core.generation.contradictions import contradictions

        if faults := contradictions(self):
            raise ValueError(
                "options of generation contradict each other:\n  " + "\n  ".join(faults)
            )

    def check_honoured(self) -> None:
        """Refuse what a file asks for and nobody here does.

        Raises:
            ValueError: naming the option and the value that asks nothing.
        """
        for name, value in self._extra.items():
            if name in NEUTRAL:
                refuse_unhonoured(name, value)

    def merged(self, **options: Any) -> GenerationConfig:
        """A new configuration in which the given options replace those of this one.

        An explicit None counts: `eos_token_id=None` never stops. A given length replaces the other
        way of saying it: `max_length=9` also drops a `max_new_tokens` of this configuration, and
        likewise for the least length.

        Raises:
            ValueError: as the constructor; also for what a file asks for and is not honoured.
        """
        result = copy.deepcopy(self)
        for most in ("max", "min"):
            pair = (f"{most}_length", f"{most}_new_tokens")
            for one, other in (pair, pair[::-1]):
                if options.get(one) is not None and options.get(other) is None:
                    result.__dict__[other] = None
        for name, value in options.items():
            setattr(result, name, value)
        result.check_honoured()
        result._warn_of_idle(options)
        return result

    def _warn_of_idle(self, options: Mapping[str, Any]) -> None:
        for most in ("max", "min"):
            if None not in (options.get(f"{most}_length"), options.get(f"{most}_new_tokens")):
                warnings.warn(
                    f"{most}_length changes nothing beside {most}_new_tokens", stacklevel=4
                )
        waits = (
            self.do_sample,
            self.do_sample or bool(self.penalty_alpha),
            self.num_beams > 1,
            bool(self.prompt_lookup_num_tokens),
        )
        for (names, need), is_met in zip(_IDLE, waits, strict=True):
            asked = {n: options.get(n) for n in names}
            idle = [
                n for n, v in asked.items() if v not in (None, OPTIONS[n][0]) and v is not False
            ]
            if idle and not is_met:
                warnings.warn(f"{' and '.join(idle)} changes nothing without {need}", stacklevel=4)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """From what a `generation_config.json` holds; unknown keys are kept and written back.

        Raises:
            ValueError: an option that is honoured holds what it may not.
        """
        result = cls()
        for name, value in values.items():
            if name not in OPTIONS:
                result._extra[name] = copy.deepcopy(value)
            elif value is not None or OPTIONS[name][1].holds(None):
                setattr(result, name, value)
        return result

    @classmethod
    def from_model_config(cls, config: HasTokens) -> GenerationConfig:
        """What a model without a `generation_config.json` generates by: its token ids."""
        return cls(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        **changes: Any,
    ) -> GenerationConfig:
        """From a folder, a file or a repository of the hub, with options changed at will.

        Raises:
            CheckpointNotFound: there is no `generation_config.json`.
            ValueError: the file or an option is bad; names the file.
            HubError: the repository cannot be read.
        """
        from opt_core import hub
        from opt_core.checkpoint import CheckpointNotFound

        folder = hub.resolve(
            source,
            files=[GENERATION_FILE],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        path = folder / GENERATION_FILE if folder.is_dir() else folder
        if not path.is_file():
            raise CheckpointNotFound(
                f"{path.parent} has no {GENERATION_FILE}; "
                "GenerationConfig.from_model_config makes one of the model's configuration"
            )
        try:
            result = cls.from_dict(read_json(path))
        except ValueError as fault:
            raise ValueError(f"{path}: {fault}") from fault
        return result.merged(**changes) if changes else result

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `generation_config.json` into a folder, which is made if it is not there.

        Raises:
            ValueError: options contradict each other; see `validate`.
        """
        from opt_core.checkpoint import write_file

        self.validate()
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_file(Path(folder) / GENERATION_FILE, self.to_json_string().encode())

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and the kept keys; `from_dict` reads it back."""
        values: dict[str, Any] = copy.deepcopy(self._extra)
        given = {n: self.__dict__[n] for n, (default, _) in OPTIONS.items()}
        # transformers reads a top_k of null as its default; 0 is off in all its versions.
        given["top_k"] = given["top_k"] or 0
        values.update({n: copy.copy(v) for n, v in given.items() if v != OPTIONS[n][0]})
        return values

    def to_json_string(self) -> str:
        """What `generation_config.json` holds: sorted keys, ends with a line break."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"
