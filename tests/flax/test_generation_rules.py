"""Rules in JAX give what transformers' processors gave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from opt_core.generation import GenerationConfig, Plan, given
from opt_flax.generation.rules import Text, ruled

#: float32 arithmetic on scores of size 10.
TOLERANCE = 2e-5

#: What each row of the data asks for, by its name: the rule, the options, and the prompt's columns.
Asks = Callable[[dict[str, Any]], dict[str, Any]]
ASKS: dict[str, Asks] = {
    "temperature": lambda o: {"temperature": o["temperature"]},
    "top_k": lambda o: {"top_k": max(o["top_k"], o.get("min_tokens_to_keep", 1))},
    "top_p": lambda o: {"top_p": o["top_p"]},
    "min_p": lambda o: {"min_p": o["min_p"]},
    "typical_p": lambda o: {"typical_p": o["mass"]},
    "epsilon_cutoff": lambda o: {"epsilon_cutoff": o["epsilon"]},
    "eta_cutoff": lambda o: {"eta_cutoff": o["epsilon"]},
    "renormalize_logits": lambda o: {"renormalize_logits": True},
    "repetition_penalty": lambda o: {"repetition_penalty": o["penalty"]},
    "no_repeat_ngram_size": lambda o: {"no_repeat_ngram_size": o["ngram_size"]},
    "sequence_bias": lambda o: {"sequence_bias": o["sequence_bias"]},
    "bad_words_ids": lambda o: dict(o),
    "remove_invalid_values": lambda o: {"remove_invalid_values": True},
    "suppress_tokens": lambda o: {"suppress_tokens": o["suppress_tokens"]},
    "begin_suppress_tokens": lambda o: {"begin_suppress_tokens": o["begin_suppress_tokens"]},
    "min_length": lambda o: dict(o),
    "min_new_tokens": lambda o: {n: v for n, v in o.items() if n != "prompt_length_to_skip"},
    "forced_bos_token_id": lambda o: {"forced_bos_token_id": o["bos_token_id"]},
    "forced_eos_token_id": lambda o: {"forced_eos_token_id": o["eos_token_id"]},
    "exponential_decay_length_penalty": lambda o: {
        n: v for n, v in o.items() if n != "input_ids_seq_length"
    },
}
CUTS = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def test_every_rule_agrees_with_the_reference_data(shared: Path) -> None:
    folder = shared / "reference" / "generation"
    rows = json.loads((folder / "processors.json").read_text())
    single = [row for row in rows if row["name"] != "combined"]
    assert {row["name"] for row in single} == set(ASKS)
    with np.load(folder / "processors.npz") as arrays:
        for row in single:
            result = np.asarray(applied(row, arrays[row["input"]], arrays["input_ids"]))
            expected = arrays[row["key"]]
            # What is forbidden stays so; in transformers the decay makes it NaN.
            was_forbidden = np.isneginf(arrays[row["input"]]) & np.isnan(expected)
            expected = np.where(was_forbidden, -np.inf, expected)
            if row["key"] == "p032":
                # Which of equal tokens stays was the sort's whim there; here it is the first.
                result, expected = np.sort(result), np.sort(expected)
            close = np.isclose(result, expected, rtol=1e-5, atol=TOLERANCE, equal_nan=True)
            assert close.all(), (row, result[~close], expected[~close])


def applied(row: dict[str, Any], scores: Any, ids: Any) -> Any:
    """The scores after one rule, for a text of all columns or only the first."""
    name, options = row["name"], row["kwargs"]
    asked = GenerationConfig(do_sample=True, **ASKS[name](options))
    P = next((v for n, v in options.items() if n in STARTS), 4)
    length = 1 if name == "forced_bos_token_id" else ids.shape[1]
    P = 1 if name == "forced_bos_token_id" else P
    most = options.get("max_length", 30) - P
    minimum = max(asked.min_new_tokens or 0, (asked.min_length or 0) - P)
    rule = "min_new_tokens" if name == "min_length" else name
    planned = Plan(P, most, minimum, 64, 64, 8)
    V = scores.shape[1]
    arrays = given(asked, planned, vocab_size=V, known=V)[rule]
    if rule in CUTS:
        arrays = (*arrays[:1], np.array(options.get("min_tokens_to_keep", 1), np.int32))
    tokens = np.full((len(ids), 64), 1, np.int32)
    tokens[:, :length] = ids[:, :length]
    narrow = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    text = Text(jnp.asarray(tokens), jnp.int32(length), jnp.arange(len(ids)), None)
    return ruled((rule,), jnp.asarray(scores, jnp.float32), text, {rule: tuple(narrow)})


#: Names under which a processor is told how long the prompt is.
STARTS = ("prompt_length_to_skip", "begin_index", "input_ids_seq_length")
