"""Generation gives the token sequences that transformers gave on a trained model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.weights import Head
from tests.cases import PAD
from tests.subject import MARGIN
from tests.wings import Wing

_FILE = "reference/generation/sequences.json"
_PATH = Path(__file__).resolve().parents[2] / "shared" / _FILE
ENTRIES: list[Any] = json.loads(_PATH.read_text())["entries"] if _PATH.is_file() else []

#: The largest difference of a beam's score, a mean of log-probabilities, between two float32 runs.
SCORE_ERROR = 1e-4


@pytest.fixture(scope="module")
def inputs(shared: Path) -> Any:
    return json.loads((shared / _FILE).read_text())["inputs"]


@pytest.fixture(scope="module")
def trained(wing: Wing, shared: Path) -> Any:
    return wing.load(Head.CAUSAL_LM, shared / "reference/generation/model")


@pytest.fixture(scope="module")
def assistant(wing: Wing, shared: Path) -> Any:
    return wing.load(Head.CAUSAL_LM, shared / "reference/generation/assistant")


def test_every_entry_is_a_sure_one() -> None:
    """No choice but between equals (both forced) hangs on rounding."""
    gaps = [e["smallest_gap_to_second"] for e in ENTRIES if "smallest_gap_to_second" in e]
    assert all(gap >= MARGIN or gap == 0 for gap in gaps)
    assert all(e.get("same_in_float64", e.get("same_with_disturbed_weights")) for e in ENTRIES)


@pytest.mark.filterwarnings("ignore:max_length changes nothing")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_tokens_are_those_of_the_reference_data(
    wing: Wing, trained: Any, assistant: Any, inputs: Any, entry: Any
) -> None:
    prompt = {name: np.array(values) for name, values in inputs[entry["inputs"]].items()}
    options = dict(entry["kwargs"])
    if options.pop("assistant", False):
        options["assistant_model"] = assistant
    found = wing.generate_lightly(trained, **prompt, **options, return_dict_in_generate=True)
    rows = entry["sequences"]
    width = max(map(len, rows))
    np.testing.assert_array_equal(
        found.sequences, [row + [PAD] * (width - len(row)) for row in rows]
    )
    if "sequences_scores" in entry:
        np.testing.assert_allclose(
            found.sequences_scores, entry["sequences_scores"], rtol=0, atol=SCORE_ERROR
        )
    # transformers counts the beams of a group from 0.
    if "beam_indices" in entry and "num_beam_groups" not in options:
        indices = np.full((len(rows), found.beam_indices.shape[1]), -1)
        for row, places in enumerate(entry["beam_indices"]):
            chosen = [place for place in places if place >= 0]
            indices[row, : len(chosen)] = chosen
        np.testing.assert_array_equal(found.beam_indices, indices)


def test_a_text_searches_as_if_alone_unless_it_is_told_to_wait(
    wing: Wing, trained: Any, inputs: Any
) -> None:
    entry = next(entry for entry in ENTRIES if entry["name"] == "beam4_lp1.0_early_False")
    prompt = {name: np.array(values) for name, values in inputs[entry["inputs"]].items()}
    options = {**entry["kwargs"], "early_stopping": None}
    found = wing.generate_lightly(trained, **prompt, **options)
    rows = entry["other_version"]["sequences"]
    width = max(map(len, rows))
    np.testing.assert_array_equal(found, [row + [PAD] * (width - len(row)) for row in rows])
