"""`optlm generate`: continue a text, and show it as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from opt_core.cli import asking, backends, sources, terminal

if TYPE_CHECKING:
    from opt_core.cli.backends import Backend
    from opt_core.cli.continuing import Ints
    from opt_core.tokenizer import OPTTokenizer

NAME = "generate"
DESCRIPTION = """\
continue a text, shown as it comes

Options that are not given are the model's own (its generation_config.json), or else the likeliest
token is taken each time; with --sample or an option of sampling tokens are drawn. The same --seed
draws the same tokens in every backend. Beams settle at the end, and so
are shown at the end; several sequences as a table, with their scores.
The texts of --force-word, --bad-word and --bias are taken as they are written, so that a space
before a word counts; ids:5,6 names tokens instead.
"""
EPILOG = """\
examples:
  optlm generate tiny-opt --prompt "ROMEO:"
  optlm generate tiny-opt --prompt "ROMEO:" --temperature 0.8 --top-p 0.9 --seed 1
  optlm generate tiny-opt --prompt "ROMEO:" --num-beams 4 --num-return-sequences 3
  optlm generate tiny-opt --prompt "ROMEO:" --penalty-alpha 0.6 --top-k 4 --stop $'\\n\\n'
  optlm generate path/to/folder --prompt - < prompt.txt
  optlm generate facebook/opt-350m --prompt "The meaning of life is" --backend torch --dtype auto
  optlm generate facebook/opt-6.7b --prompt "Once" --assistant facebook/opt-125m
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    sources.add_options(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the text to continue; - reads it from stdin",
    )
    backends.add_options(parser)
    asking.add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the prompt and what follows it.

    Raises:
        ValueError: a bad option, or no room for the tokens asked for; nothing is printed then.
    """
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    tokenizer = sources.tokenizer(options)
    backend = backends.load(options, sources.locate(options))
    prompt = _ids(text, tokenizer)
    room = backend.config.max_position_embeddings - prompt.shape[1]
    own = backend.generation
    asked = asking.asked(options, tokenizer, room, own)
    if options.assistant is not None:
        asked["assistant_model"] = _assistant(options)
    if options.negative_prompt is not None:
        asked["negative_prompt_ids"] = _ids(options.negative_prompt, tokenizer)
    whole = {n: getattr(own, n) for n in ("num_beams", "num_return_sequences")} | asked
    if whole["num_beams"] == whole["num_return_sequences"] == 1:
        _show_as_it_comes(backend, text, prompt, tokenizer, asked)
    else:
        _show_at_the_end(backend, text, prompt, tokenizer, asked)
    return 0


def _assistant(options: argparse.Namespace) -> Backend:
    """The drafting model; revision and subfolder speak of the model itself."""
    other = {**vars(options), "checkpoint": options.assistant, "revision": None, "subfolder": ""}
    return backends.load(options, sources.locate(argparse.Namespace(**other)))


def _ids(text: str, tokenizer: OPTTokenizer) -> Ints:
    return np.array([tokenizer(text)["input_ids"]], np.int64)


def _show_as_it_comes(
    backend: Backend, text: str, prompt: Ints, tokenizer: OPTTokenizer, asked: dict[str, Any]
) -> None:
    decoder = tokenizer.decode_stream(skip_special_tokens=True)
    pending = text
    for token in backend.tokens(prompt, tokenizer, asked):
        print(pending + decoder.step(token), end="", flush=True)
        pending = ""
    print(pending + decoder.finish())


def _show_at_the_end(
    backend: Backend, text: str, prompt: Ints, tokenizer: OPTTokenizer, asked: dict[str, Any]
) -> None:
    rows, scores = backend.sequences(prompt, tokenizer, asked)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    if len(texts) == 1:
        print(text + texts[0])
        return
    # One line a sequence, so that a pipe can be read line by line.
    shown = [
        [str(place) if score is None else f"{score:.4f}", line.replace("\n", "\\n")]
        for place, (score, line) in enumerate(zip(scores, texts, strict=True), 1)
    ]
    heading = "" if scores[0] is None else "score"
    out = terminal.console()
    out.print(text + "\n")
    out.print(terminal.table([heading, "continuation"], shown, right=(heading,)))
