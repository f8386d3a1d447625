"""What transformers 4.53.3 generates from a tiny model by options that its published data lack.

In an environment with transformers 4.53.3 and torch: `python -m tests.data.searches` writes
searches.json anew. It refuses entries that are close calls: those that come out otherwise when all
weights change by 1e-5. Left out is where it is known to be wrong; docs/decoding.md says where.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.reference import disturbed
from opt_core.weights import Head, table

FILE = Path(__file__).with_suffix(".json")

PROMPTS: dict[str, list[list[int]]] = {
    "one": [[7, 12, 4, 9, 3]],
    "short": [[8]],
    "batch": [[5, 11, 3, 6], [1, 1, 9, 4], [1, 10, 6, 6]],
}
STOPS = [2, 15, 19]

_BEAMS: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 9, "eos_token_id": STOPS}
_ALL = _BEAMS | {"num_return_sequences": 4}
_WORDS = _BEAMS | {"max_new_tokens": 8}
#: Many stop tokens, so that the best candidate of a step has often just ended.
_THREES: dict[str, Any] = {
    "num_beams": 6,
    "num_beam_groups": 2,
    "num_return_sequences": 6,
    "max_new_tokens": 14,
    "eos_token_id": [*STOPS, 20, 13],
}
_GREEDY: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}

#: Name, prompts, options.
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (f"beams {stopping} {penalty}", prompt, _ALL | {"early_stopping": stopping, **changes})
        for prompt, stopping in (("batch", True), ("batch", "never"), ("one", False))
        for penalty, changes in (
            ("neutral", {"length_penalty": 0.0}),
            ("long", {"length_penalty": 2.5}),
            ("short", {"length_penalty": -1.0}),
        )
    ),
    ("beams without stops", "batch", _ALL | {"eos_token_id": None}),
    ("beams after one token", "short", _ALL | {"num_beams": 3, "num_return_sequences": 2}),
    ("beams: repetitions", "batch", _ALL | {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
    (
        "beams: biases",
        "batch",
        _ALL
        | {
            "sequence_bias": [[[7], -2.0], [[20, 21], 3.0], [[22, 6], 1.5]],
            "bad_words_ids": [[9], [20, 20], [3, 4, 5]],
        },
    ),
    (
        "beams: lengths",
        "one",
        _ALL
        | {
            "min_new_tokens": 3,
            "exponential_decay_length_penalty": [4, 1.2],
        },
    ),
    ("beams: a forced end", "batch", _BEAMS | {"forced_eos_token_id": 19}),
    (
        "beams: suppressed and normalised",
        "one",
        _ALL
        | {
            "suppress_tokens": [20, 5],
            "begin_suppress_tokens": [22, 3],
            "renormalize_logits": True,
            "repetition_penalty": 1.2,
        },
    ),
    *(
        (f"{groups} groups {penalty}", prompt, _ALL | {"num_beam_groups": groups, **changes})
        for prompt, groups in (("one", 2), ("batch", 4))
        for penalty, changes in (
            ("near", {"diversity_penalty": 0.4}),
            ("far", {"diversity_penalty": 2.5, "early_stopping": True}),
            ("never", {"diversity_penalty": 1.0, "early_stopping": "never"}),
        )
    ),
    (
        "groups: repetitions",
        "batch",
        _ALL | {"num_beam_groups": 2, "diversity_penalty": 1.0, "no_repeat_ngram_size": 2},
    ),
    *(
        (f"groups of three {penalty} {prompt}", prompt, _THREES | {"diversity_penalty": penalty})
        for prompt in ("one", "short")
        for penalty in (0.2, 0.3, 0.5)
    ),
    ("a word", "batch", _WORDS | {"force_words_ids": [[20]]}),
    ("a phrase", "batch", _WORDS | {"force_words_ids": [[20, 13, 22]]}),
    ("two phrases", "one", _WORDS | {"force_words_ids": [[20, 13], [22, 21]]}),
    (
        "two phrases without stops",
        "one",
        _WORDS | {"force_words_ids": [[20, 13], [22, 21]], "eos_token_id": None},
    ),
    ("one of two phrases", "batch", _WORDS | {"force_words_ids": [[[20, 13], [22, 14, 21]]]}),
    (
        "one of two phrases and a word",
        "one",
        _WORDS | {"force_words_ids": [[[20, 13], [22, 14]], [23]], "early_stopping": True},
    ),
    ("the same word twice", "one", _WORDS | {"force_words_ids": [[20], [20]]}),
    (
        "several with a word",
        "one",
        _WORDS | {"force_words_ids": [[20]], "num_return_sequences": 3, "eos_token_id": None},
    ),
    (
        "a word: repetitions",
        "batch",
        _WORDS | {"force_words_ids": [[20, 13]], "repetition_penalty": 1.4, "length_penalty": 2.0},
    ),
    *(
        (f"contrastive {alpha} {k}", "batch", _GREEDY | {"penalty_alpha": alpha, "top_k": k})
        for alpha, k in ((0.1, 2), (0.6, 4), (0.9, 8), (1.0, 3))
    ),
    (
        "contrastive: repetitions",
        "batch",
        _GREEDY | {"penalty_alpha": 0.5, "top_k": 5, "repetition_penalty": 1.3},
    ),
    (
        "contrastive with stops",
        "batch",
        _GREEDY | {"penalty_alpha": 0.5, "top_k": 5, "eos_token_id": STOPS},
    ),
    (
        "greedy: many rules",
        "one",
        {
            "max_new_tokens": 10,
            "eos_token_id": STOPS,
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "sequence_bias": [[[7], -2.0], [[20, 21], 3.0]],
            "bad_words_ids": [[9], [20, 20]],
            "min_new_tokens": 4,
            "exponential_decay_length_penalty": [5, 1.2],
            "suppress_tokens": [5],
            "begin_suppress_tokens": [22],
            "renormalize_logits": True,
        },
    ),
    ("guidance", "one", _GREEDY | {"guidance_scale": 1.7}),
    ("guidance away", "one", _GREEDY | {"guidance_scale": 0.4, "repetition_penalty": 1.3}),
]


def config() -> OPTConfig:
    """The model's configuration."""
    return OPTConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )


def weights() -> dict[str, NDArray[np.float64]]:
    """The model's weights, by canonical name."""
    noise = np.random.default_rng(11)
    return {
        name: noise.normal(row.mean, 0.35, row.shape)
        for name, row in table(config(), Head.CAUSAL_LM).items()
    }


def main() -> None:
    """Write the file.

    Raises:
        RuntimeError: an entry is a close call.
    """
    entries = []
    for name, prompt, options in ASKED:
        found = _found(weights(), prompt, options)
        for seed in range(3):
            if _found(disturbed(weights(), seed), prompt, options)[0] != found[0]:
                raise RuntimeError(f"{name} is a close call")
        entries.append({"name": name, "prompt": prompt, "options": options, "sequences": found[0]})
        if found[1] is not None:
            entries[-1]["scores"] = [
                round(score, 5) if math.isfinite(score) else str(score) for score in found[1]
            ]
    text = ",\n".join(json.dumps(entry) for entry in entries)
    FILE.write_text(f"[\n{text}\n]\n")


def _found(arrays: dict[str, Any], prompt: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Sequences, and their scores where they have any."""
    import torch
    import transformers as theirs

    model: Any = theirs.OPTForCausalLM(theirs.OPTConfig(**config().to_dict()))
    model.eval()
    tensors = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    model.load_state_dict(tensors)
    model.generation_config.update(bos_token_id=2, eos_token_id=None, pad_token_id=1)
    ids = torch.tensor(PROMPTS[prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=(ids != 1).long(),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    scores = found.get("sequences_scores")
    return found.sequences.tolist(), None if scores is None else scores.tolist()


if __name__ == "__main__":
    main()
