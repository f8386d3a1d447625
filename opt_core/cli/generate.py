"""`optlm generate`: continue a text, and show it as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from opt_core.cli import backends, sources

NAME = "generate"
DESCRIPTION = """\
continue a text, shown as it comes

Takes the likeliest token each time, unless --sample or an option of sampling is given: then tokens
are drawn. The same --seed draws the same tokens in every backend.
"""
EPILOG = """\
examples:
  optlm generate tiny-opt --prompt "ROMEO:"
  optlm generate tiny-opt --prompt "ROMEO:" --temperature 0.8 --top-p 0.9 --seed 1
  optlm generate path/to/folder --prompt - < prompt.txt
  optlm generate facebook/opt-350m --prompt "The meaning of life is" --backend torch --dtype auto
"""

DEFAULT_NEW_TOKENS = 50

#: Options that mean sampling, and the type of each.
_SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int}
_HELP = {
    "temperature": "flatten (above 1) or sharpen (below 1) the distribution (1)",
    "top_k": "draw from this many likeliest tokens, 0 for all (50)",
    "top_p": "draw from the likeliest tokens that have this much probability together (1)",
    "min_p": "leave out tokens less likely than this share of the likeliest one",
    "seed": "draw these numbers again (fresh ones)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    sources.add_options(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the text to continue; - reads it from stdin",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"at most this many ({DEFAULT_NEW_TOKENS}, or what there is room for)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sample", action="store_true", help="draw tokens")
    for name, kind in _SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        sampling.add_argument(flag, type=kind, metavar="X", help=_HELP[name])
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="make tokens that are there already less likely (1)",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after a token that ends the text"
    )
    backends.add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the prompt and what follows it.

    Raises:
        ValueError: a bad option, or no room for the tokens asked for; nothing is printed then.
    """
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    tokenizer = sources.tokenizer(options)
    backend = backends.load(options, sources.locate(options))
    prompt = np.array([tokenizer(text)["input_ids"]], np.int64)
    room = backend.config.max_position_embeddings - prompt.shape[1]
    tokens = backend.tokens(prompt, tokenizer, generation_options(options, room))
    decoder = tokenizer.decode_stream(skip_special_tokens=True)
    pending = text
    for token in tokens:
        print(pending + decoder.step(token), end="", flush=True)
        pending = ""
    print(pending + decoder.finish())
    return 0


def generation_options(options: argparse.Namespace, room: int) -> dict[str, Any]:
    """What a backend is asked for: drawing, if any option of it was given."""
    given = {name: getattr(options, name) for name in (*_SAMPLING, "repetition_penalty")}
    given = {name: value for name, value in given.items() if value is not None}
    length = options.max_new_tokens
    if length is None:
        length = max(1, min(DEFAULT_NEW_TOKENS, room))
    asked: dict[str, Any] = {"max_new_tokens": length, **given}
    asked["do_sample"] = options.sample or any(name in given for name in _SAMPLING)
    if options.ignore_eos:
        asked["eos_token_id"] = None
    return asked
