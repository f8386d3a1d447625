"""Every decoding strategy and group of rules, with values that tests draw.

Values never make a wing compile anew; which strategy and which rules there are does. So the
combinations are few, and all batches have one shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.cases import PAD, Batch, words

Options = dict[str, Any]

#: Rows and columns of every batch, and how many tokens follow.
ROWS, COLUMNS, NEW = 3, 9, 6
STOPS = [5, 9, 11, 20]

_SEEDS = st.integers(0, 2**64 - 1)


def _of(**options: Any) -> st.SearchStrategy[Options]:
    """Options by name: a value, or what draws one."""
    return st.fixed_dictionaries(
        {n: v if isinstance(v, st.SearchStrategy) else st.just(v) for n, v in options.items()}
    )


def _one(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


_DRAWN: Options = {
    "do_sample": True,
    "seed": _SEEDS,
    "temperature": _one(0.5, 1.0, 3.0),
    "top_k": _one(0, 5, 50),
    "top_p": _one(0.5, 0.9, 1.0),
}

#: Strategies by name. An "assistant" is to be replaced by a model.
STRATEGIES: Mapping[str, st.SearchStrategy[Options]] = {
    "greedy": _of(),
    "sampling": _of(**_DRAWN, min_p=_one(0.0, 0.1)),
    "beams": _of(
        num_beams=3,
        num_return_sequences=3,
        length_penalty=_one(-1.0, 0.0, 0.5, 1.0, 2.0),
        early_stopping=_one(True, None, False, "never"),
    ),
    "beam sampling": _of(num_beams=3, num_return_sequences=2, **_DRAWN),
    "groups": _of(
        num_beams=4, num_beam_groups=2, num_return_sequences=4, diversity_penalty=_one(0.3, 2.0)
    ),
    "forced words": _of(
        num_beams=3,
        num_return_sequences=2,
        force_words_ids=_one([[7]], [[7, 8], [[12], [13, 14]]]),
    ),
    "contrastive": _of(penalty_alpha=_one(0.2, 0.6, 1.0), top_k=4),
    "lookup": _of(prompt_lookup_num_tokens=3, max_matching_ngram_size=_one(1, 2)),
    "sampled lookup": _of(prompt_lookup_num_tokens=3, **_DRAWN),
    "assisted": _of(assistant_model="assistant", num_assistant_tokens=3),
    "sampled assisted": _of(assistant_model="assistant", num_assistant_tokens=3, **_DRAWN),
}

#: Groups of rules by name.
RULES: Mapping[str, st.SearchStrategy[Options]] = {
    "no rules": _of(),
    "looking back": _of(
        repetition_penalty=_one(0.8, 1.3),
        no_repeat_ngram_size=_one(1, 2, 3),
        sequence_bias=_one([[[7], 2.0], [[8, 9], -1.5]], [[[6, 7, 8], 4.0]]),
        bad_words_ids=_one([[10], [11, 12]], [[6], [7], [8]]),
    ),
    "ending": _of(
        min_new_tokens=_one(1, 3),
        exponential_decay_length_penalty=_one((1, 1.5), (4, 3.0)),
        forced_eos_token_id=_one(20, [5, 20]),
        suppress_tokens=_one([6], [7, 8, 9]),
    ),
    "beginning": _of(
        begin_suppress_tokens=_one([6], list(range(3, 30))),
        remove_invalid_values=True,
        renormalize_logits=True,
    ),
    "cuts": _of(
        typical_p=_one(0.2, 0.9), epsilon_cutoff=_one(0.01, 0.1), eta_cutoff=_one(0.01, 0.1)
    ),
    "guidance": _of(guidance_scale=_one(0.5, 2.0)),
}

#: What is tested together, and what besides in the long version.
PAIRS = [
    *((strategy, "no rules") for strategy in STRATEGIES),
    *((s, "looking back") for s in ("greedy", "beams")),
    *((s, "ending") for s in ("sampling", "beams", "groups")),
    *((s, "beginning") for s in ("greedy", "beam sampling")),
    ("sampling", "cuts"),
    ("beams", "guidance"),
]
MORE_PAIRS = [
    *((s, "looking back") for s in ("contrastive", "sampled lookup")),
    *((s, "ending") for s in ("forced words", "assisted")),
    *((s, "cuts") for s in ("beam sampling", "sampled assisted")),
    ("sampling", "guidance"),
]


@st.composite
def ragged(draw: st.DrawFn) -> Batch:
    """Texts of any length in one shape: padded on either side, with holes, or whole."""
    ids = words(ROWS, COLUMNS, draw(st.integers(0, 2**16)))
    kind = draw(_one("whole", "left", "right", "holes"))
    if kind == "whole":
        return Batch(ids, None)
    counts = np.array(draw(st.lists(st.integers(1, COLUMNS), min_size=ROWS, max_size=ROWS)))
    places = np.arange(COLUMNS)
    if kind == "holes":
        bits = draw(st.lists(st.booleans(), min_size=ids.size, max_size=ids.size))
        shown = np.array(bits).reshape(ids.shape) | (places == counts[:, None] - 1)
    elif kind == "left":
        shown = places >= COLUMNS - counts[:, None]
    else:
        shown = places < counts[:, None]
    return Batch(np.where(shown, ids, PAD), shown.astype(np.int64))
