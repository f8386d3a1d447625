"""`optlm eval`: the perplexity of a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from opt_core.cli import backends, sources, terminal
from opt_core.evaluation import Evaluation, evaluate, windows

NAME = "eval"
DESCRIPTION = """\
perplexity of a text, by sliding window

The text is one sequence of tokens with </s> before it. Windows of --window tokens start --stride
tokens apart; every token of the text counts once, in the first window that holds it. The same
number comes from every backend.
"""
EPILOG = """\
examples:
  optlm eval tiny-opt --text book.txt
  optlm eval facebook/opt-125m --text book.txt --window 2048 --stride 512 --device cuda
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    sources.add_options(parser)
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="in UTF-8")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens fed at once (all positions of the model)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window (half a window)"
    )
    backends.add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the figures of the text.

    Raises:
        ValueError: the text is empty or not UTF-8, or the windows do not fit the model.
    """
    text = _read(options.text)
    tokenizer = sources.tokenizer(options)
    backend = backends.load(options, sources.locate(options))
    most = backend.config.max_position_embeddings
    window = most if options.window is None else options.window
    stride = max(1, window // 2) if options.stride is None else options.stride
    if window > most:
        raise ValueError(
            f"--window is {window}, but the model has {most} positions; give at most that many"
        )
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    cuts = list(windows(len(ids), window=window, stride=stride))
    result = evaluate(text, ids, backend.logits, terminal.tracked("Scoring windows", cuts))
    terminal.console().print(terminal.pairs(_figures(result, window, stride)))
    return 0


def _read(path: Path) -> str:
    try:
        # Not as a text file: line ends count as they are.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _figures(result: Evaluation, window: int, stride: int) -> list[tuple[str, str]]:
    return [
        ("perplexity", f"{result.perplexity:.5g}"),
        ("nats per token", f"{result.nats_per_token:.4f}"),
        ("bits per character", f"{result.bits_per_character:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("tokens", str(result.tokens)),
        ("characters", str(result.characters)),
        ("bytes", str(result.size_bytes)),
        ("windows", f"{result.windows} of at most {window} tokens, {stride} apart"),
    ]
