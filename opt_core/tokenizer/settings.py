"""What a tokenizer does beside its vocabulary: its special tokens, its sides, its limits."""

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

# What transformers writes where a tokenizer has no limit, so that both read each other's files.
NO_LIMIT = int(1e30)
# What transformers takes for a length at all; beyond it there is no limit.
LONGEST = int(1e20)
ID_LIMIT = 1 << 32  # the library keeps ids in 32 bits
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerError(ValueError):
    """A tokenizer's files, or what they say, cannot be used."""


class TokenizerNotFound(FileNotFoundError):
    """The source holds no tokenizer."""


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of `tokenizer_config.json`; the defaults are those of the published OPT models.

    `other` holds the keys that are not ours: they are written back as they were read.

    Raises:
        TokenizerError: a value is not one that the setting can take.
    """

    bos_token: str = "</s>"
    eos_token: str = "</s>"
    unk_token: str = "</s>"
    pad_token: str = "<pad>"
    add_bos_token: bool = True
    add_prefix_space: bool = False
    clean_up_tokenization_spaces: bool = False
    errors: str = "replace"
    model_max_length: int = NO_LIMIT
    padding_side: str = "right"
    truncation_side: str = "right"
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SPECIAL_TOKENS:
            self._require(name, _is_token, "a string with at least one character")
        for name in ("add_bos_token", "add_prefix_space", "clean_up_tokenization_spaces"):
            self._require(name, lambda value: isinstance(value, bool), "True or False")
        for name in ("padding_side", "truncation_side"):
            self._require(name, ("left", "right").__contains__, "'left' or 'right'")
        self._require("model_max_length", _is_count, "a whole number from 1")
        self._require("errors", _is_error_handler, "an error handler of Python's codecs")

    def _require(self, name: str, holds: Any, expected: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise TokenizerError(f"{name} should be {expected}, not {value!r}")

    @property
    def named(self) -> dict[str, str]:
        """The special tokens by the names of their attributes."""
        return {name: getattr(self, name) for name in SPECIAL_TOKENS}


KNOWN = frozenset(f.name for f in fields(TokenizerSettings)) - {"other"}


def _is_token(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_error_handler(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(codecs.lookup_error(value))
    except LookupError:
        return False
