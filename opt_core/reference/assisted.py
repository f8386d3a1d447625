"""Assisted decoding: which tokens are drafted, and how many passes of the model they save.

The model chooses at every place exactly as without drafts, so drafts change no token: `plain` is
the meaning of assisted decoding. A pass over some drafts settles those that the model chooses too,
and the first that it chooses otherwise, or the one after them all.
"""

from __future__ import annotations

from dataclasses import replace

from opt_core.reference.chain import Line, score
from opt_core.reference.setup import Run
from opt_core.reference.steps import chooser, plain


def rounds(run: Run) -> list[int]:
    """How many tokens each pass of the model settles, for a run of one text."""
    tokens = [int(step.tokens[0]) for step in plain(run)]
    settled: list[int] = []
    while (count := sum(settled)) < len(tokens):
        drafts, rest = drafted(run, tokens[:count]), tokens[count:]
        agreed = [draft == token for draft, token in zip(drafts, rest, strict=False)]
        same = agreed.index(False) if False in agreed else len(agreed)
        settled.append(min(same + 1, len(rest)))
    return settled


def drafted(run: Run, new: list[int]) -> list[int]:
    """The drafts for what follows some new tokens of a run's first text.

    An assistant chooses them by its own scores, but the same rules and the same uniforms.
    """
    if run.call.assistant is None:
        text, longest = run.texts[0] + new, run.asked.max_matching_ngram_size or 1
        return looked_up(text, longest, run.asked.prompt_lookup_num_tokens or 0)
    config, weights = run.call.assistant
    assistant = replace(run, config=config, weights=weights)
    choose, line = chooser(run), Line(0, new)
    for _ in range(min(run.asked.num_assistant_tokens, run.planned.max_new_tokens - len(new))):
        scores = score(assistant, [line]).scores[0]
        line = line._replace(new=[*line.new, choose(scores, line).token])
    return line.new[len(new) :]


def looked_up(text: list[int], longest: int, count: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest ending of a text.

    Endings of at most `longest` tokens are sought, and at most `count` tokens are copied.
    """
    for size in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + count]
    return []
