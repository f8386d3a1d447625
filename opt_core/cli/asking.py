"""The options of generation as flags of a command line, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from opt_core.generation import GenerationConfig
    from opt_core.tokenizer import OPTTokenizer

DEFAULT_NEW_TOKENS = 50

#: Token ids instead of a text begin like this.
_IDS = "ids:"


class Flag(NamedTuple):
    """One option of generation on a command line."""

    #: The option of `GenerationConfig`; its flag is `--` and this name, with dashes.
    option: str
    #: What reads its value; None: the flag alone sets it to True.
    reads: Callable[[str], Any] | None
    shown: str | None
    help: str


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _decay(text: str) -> tuple[int, float]:
    start, factor = text.split(",")
    return int(start), float(factor)


def _early(text: str) -> bool | str:
    if text not in ("true", "false", "never"):
        raise ValueError(text)
    return text if text == "never" else text == "true"


# What argparse calls a value that cannot be read.
_ids.__name__, _decay.__name__, _early.__name__ = "ids", "START,FACTOR", "early stopping"

#: Flags by group. Those of "sampling" mean that tokens are drawn.
FLAGS: Mapping[str, tuple[Flag, ...]] = {
    "length": (
        Flag(
            "max_new_tokens",
            int,
            "N",
            f"at most this many ({DEFAULT_NEW_TOKENS}, or what there is room for)",
        ),
        Flag("min_new_tokens", int, "N", "no stop token before so many"),
        Flag("max_length", int, "N", "at most so many tokens, the prompt included"),
        Flag("min_length", int, "N", "no stop token before so many, the prompt included"),
    ),
    "sampling": (
        Flag(
            "temperature",
            float,
            "X",
            "flatten (above 1) or sharpen (below 1) the distribution (1)",
        ),
        Flag("top_k", int, "N", "draw from this many likeliest tokens, 0 for all (50)"),
        Flag(
            "top_p",
            float,
            "X",
            "draw from the likeliest tokens that have this much probability together (1)",
        ),
        Flag("min_p", float, "X", "leave out tokens less likely than this share of the likeliest"),
        Flag("typical_p", float, "X", "draw from the tokens of the most typical surprise"),
        Flag("epsilon_cutoff", float, "X", "leave out tokens less likely than this"),
        Flag("eta_cutoff", float, "X", "the same, less strictly where the model is unsure"),
        Flag("seed", int, "N", "draw these numbers again (fresh ones)"),
    ),
    "beams": (
        Flag("num_beams", int, "N", "keep this many continuations, and take the likeliest whole"),
        Flag("length_penalty", float, "X", "favour long (above 0) or short (below) ones (1)"),
        Flag(
            "early_stopping",
            _early,
            "{true,false,never}",
            "when enough have ended: stop at once, when none is likely to be better (as without "
            "this option), or when none can be",
        ),
        Flag("num_return_sequences", int, "N", "show so many, also of drawn texts (1)"),
        Flag("num_beam_groups", int, "N", "search in so many groups that avoid each other"),
        Flag("diversity_penalty", float, "X", "how much they avoid each other"),
    ),
    "contrastive search": (
        Flag(
            "penalty_alpha",
            float,
            "X",
            "of the --top-k likeliest tokens prefer what repeats the text least (0 to 1)",
        ),
    ),
    "drafts (the same text, in fewer passes)": (
        Flag("num_assistant_tokens", int, "N", "tokens that the assistant drafts at a time (5)"),
        Flag("max_matching_ngram_size", int, "N", "tokens by which a place is found again (2)"),
    ),
    "what is chosen": (
        Flag("repetition_penalty", float, "X", "make tokens that are there less likely (1)"),
        Flag("no_repeat_ngram_size", int, "N", "repeat no sequence of this many tokens"),
        Flag("guidance_scale", float, "X", "follow the prompt more than the model would (1)"),
        Flag("suppress_tokens", _ids, "ID,...", "never choose these"),
        Flag("begin_suppress_tokens", _ids, "ID,...", "never choose these first"),
        Flag("forced_bos_token_id", int, "ID", "the second token of a text of one"),
        Flag("forced_eos_token_id", _ids, "ID,...", "the last token, if the text gets that long"),
        Flag(
            "exponential_decay_length_penalty",
            _decay,
            "START,FACTOR",
            "make stop tokens likelier, from so many new tokens on, by this factor a token",
        ),
        Flag("remove_invalid_values", None, None, "take scores that are no numbers as 0"),
        Flag("renormalize_logits", None, None, "make probabilities of the scores at the end"),
    ),
    "where it ends": (Flag("eos_token_id", _ids, "ID,...", "the stop tokens (the model's own)"),),
}

_DRAWS = tuple(flag.option for flag in FLAGS["sampling"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of generation, in groups."""
    groups = {title: parser.add_argument_group(title) for title in FLAGS}
    groups["sampling"].add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens, or take the likeliest whatever the model's own options say",
    )
    for title, flags in FLAGS.items():
        for flag in flags:
            name = f"--{flag.option.replace('_', '-')}"
            if flag.reads is None:
                groups[title].add_argument(name, action="store_const", const=True, help=flag.help)
            else:
                groups[title].add_argument(
                    name, type=flag.reads, metavar=flag.shown, help=flag.help
                )
    _add_texts(groups)


def _add_texts(groups: Mapping[str, Any]) -> None:
    """The options that take texts, most of them more than once."""

    def add(title: str, name: str, shown: str, said: str, *, again: bool = True) -> None:
        groups[title].add_argument(
            name, metavar=shown, action="append" if again else "store", help=said
        )

    drafts = "drafts (the same text, in fewer passes)"
    add(drafts, "--assistant", "CHECKPOINT", "a smaller model that drafts tokens", again=False)
    groups[drafts].add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="draft so many tokens from what followed the newest ones before",
    )
    add(
        "beams",
        "--force-word",
        "TEXT",
        "text that must come; | separates texts of which one is enough (may be repeated)",
    )
    add(
        "what is chosen",
        "--negative-prompt",
        "TEXT",
        "with --guidance-scale: the text to move away from (none)",
        again=False,
    )
    add("what is chosen", "--bad-word", "TEXT", "text that must not come (may be repeated)")
    add(
        "what is chosen",
        "--bias",
        "TEXT=X",
        "make a text likelier (above 0) or less likely (may be repeated)",
    )
    add("where it ends", "--stop", "TEXT", "end after this text (may be repeated)")
    groups["where it ends"].add_argument(
        "--ignore-eos", action="store_true", help="go on after a token that ends the text"
    )


def asked(
    options: argparse.Namespace, tokenizer: OPTTokenizer, room: int, own: GenerationConfig
) -> dict[str, Any]:
    """The options of `GenerationConfig` that a command line asks for, on top of the model's own.

    Raises:
        ValueError: a text has no tokens, a bias no number, or two flags contradict each other.
    """
    if options.ignore_eos and options.eos_token_id is not None:
        raise ValueError(
            "--ignore-eos never stops at a token that --eos-token-id names; choose one"
        )
    names = [flag.option for flags in FLAGS.values() for flag in flags]
    given = {name: getattr(options, name) for name in names}
    result = {name: value for name, value in given.items() if value is not None}
    lengths = (own.max_new_tokens, own.max_length)
    if not {"max_new_tokens", "max_length"} & result.keys() and lengths == (None, None):
        result["max_new_tokens"] = max(1, min(DEFAULT_NEW_TOKENS, room))
    draws = [n for n in _DRAWS if n in result and not (n == "top_k" and "penalty_alpha" in result)]
    if draws or options.sample is not None:
        result["do_sample"] = options.sample is not False
    if options.ignore_eos:
        result["eos_token_id"] = None
    if options.stop:
        result["stop_strings"] = options.stop
    if options.prompt_lookup is not None:
        result["prompt_lookup_num_tokens"] = options.prompt_lookup
    if options.bad_word:
        result["bad_words_ids"] = [words(text, tokenizer) for text in options.bad_word]
    if options.force_word:
        result["force_words_ids"] = [_either(text, tokenizer) for text in options.force_word]
    if options.bias:
        result["sequence_bias"] = [_bias(text, tokenizer) for text in options.bias]
    return result


def words(text: str, tokenizer: OPTTokenizer) -> list[int]:
    """The tokens of a text as it is written, or those that `ids:` lists.

    Raises:
        ValueError: there are none, or they are no numbers.
    """
    if text.startswith(_IDS):
        try:
            return _ids(text.removeprefix(_IDS))
        except ValueError:
            raise ValueError(f"{text!r} should list token ids, such as ids:5,6") from None
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not found:
        raise ValueError(f"{text!r} has no tokens; give a text, or ids: and token ids")
    return found


def _either(text: str, tokenizer: OPTTokenizer) -> list[Any]:
    found = [words(part, tokenizer) for part in text.split("|")]
    return found if len(found) > 1 else found[0]


def _bias(text: str, tokenizer: OPTTokenizer) -> tuple[list[int], float]:
    written, separator, value = text.rpartition("=")
    try:
        bias = float(value)
    except ValueError:
        separator = ""
    if not separator:
        raise ValueError(f"--bias {text!r} should be a text, = and a number, such as ' king=2.5'")
    return words(written, tokenizer), bias
