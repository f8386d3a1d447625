"""`optlm demo`: the checkpoint that ships, run by everything that is installed, side by side."""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np

from opt_core.cli import terminal
from opt_core.cli.backends import WINGS, Backend, NumpyReference, installed
from opt_core.cli.continuing import Ints

NAME = "demo"
DESCRIPTION = """\
run the checkpoint that ships in everything that is installed, and compare

Each installed wing continues a prompt, greedily and by seeded draws, and is held to the float64
reference in NumPy.
"""
EPILOG = "The exit code is 1 if the wings differ, or if an error exceeds its bound."

PROMPT = "ROMEO:\n"
SEED = 1
NEW_TOKENS = 24
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 40,
    "seed": SEED,
    "max_new_tokens": NEW_TOKENS,
}

#: The most by which float32 logits may differ from the reference's, as a share of the largest one.
ERROR_BOUND = 1e-5


class Outcome(NamedTuple):
    """What one backend made of the prompt."""

    title: str
    #: The largest difference to the reference's logits, as a share of the largest logit.
    error: float
    greedy: list[int]
    sampled: list[int]
    tokens_per_second: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(options: argparse.Namespace) -> int:
    """Print the comparison; 1 if anything differs that must not."""
    from opt_core.assets import TINY_OPT
    from opt_core.tokenizer import OPTTokenizer

    tokenizer = OPTTokenizer.from_pretrained(TINY_OPT)
    reference = NumpyReference(TINY_OPT)
    prompt = np.array([tokenizer(PROMPT)["input_ids"]], np.int64)
    written = list(reference.tokens(prompt, tokenizer, GREEDY))
    whole = np.concatenate([prompt, [written]], axis=1)
    expected = reference.logits(whole)
    outcomes = [_measured("NumPy, float64", reference, 0.0, prompt, tokenizer)]
    for wing in map(WINGS.__getitem__, installed()):
        with wing.one_thread():
            backend = wing.load(TINY_OPT, None, None)
            error = np.abs(backend.logits(whole) - expected).max() / np.abs(expected).max()
            title = f"{wing.title} {wing.version}"
            outcomes.append(_measured(title, backend, float(error), prompt, tokenizer))
    return report(outcomes, tokenizer)


def _measured(title: str, backend: Backend, error: float, prompt: Ints, tokenizer: Any) -> Outcome:
    """Both continuations, and the speed of a second greedy one, when everything is warm."""
    greedy = list(backend.tokens(prompt, tokenizer, GREEDY))
    sampled = list(backend.tokens(prompt, tokenizer, SAMPLED))
    before = time.perf_counter()
    count = len(list(backend.tokens(prompt, tokenizer, GREEDY)))
    seconds = time.perf_counter() - before
    return Outcome(title, error, greedy, sampled, count / seconds)


def report(outcomes: list[Outcome], tokenizer: Any) -> int:
    """Show the table and what follows from it; the exit code."""
    out = terminal.console()

    def text(tokens: list[int]) -> str:
        lines = tokenizer.decode(tokens, skip_special_tokens=True).split("\n")
        return " / ".join(line.strip() for line in lines if line.strip())

    rows = [
        [o.title, f"{o.error:.1e}", text(o.greedy), text(o.sampled), f"{o.tokens_per_second:.0f}"]
        for o in outcomes
    ]
    headings = ["wing", "logit error", "greedy", f"sampled (seed {SEED})", "tokens/s"]
    out.print(f"tiny-opt continues {PROMPT!r} by {NEW_TOKENS} tokens\n")
    out.print(terminal.table(headings, rows, right=("logit error", "tokens/s")))
    out.print()
    if len(outcomes) == 1:
        extras = " or ".join(f"pip install 'optlm[{wing.extra}]'" for wing in WINGS.values())
        out.print(f"No wing is installed, so nothing is compared. {extras} adds one.")
        return 0
    faults = _faults(outcomes)
    for fault in faults:
        out.print(fault)
    if not faults:
        out.print(
            "The continuations are equal everywhere, and every logit is within "
            f"{ERROR_BOUND:.0e} of the largest one of the reference's."
        )
    return 1 if faults else 0


def _faults(outcomes: list[Outcome]) -> list[str]:
    reference, *wings = outcomes
    faults = []
    for wing in wings:
        for way in ("greedy", "sampled"):
            if getattr(wing, way) != getattr(reference, way):
                faults.append(f"{wing.title}: the {way} continuation is not the reference's")
        if not wing.error <= ERROR_BOUND:
            faults.append(
                f"{wing.title}: the logit error {wing.error:.1e} exceeds {ERROR_BOUND:.0e}"
            )
    return faults
