"""All wings in one process on one checkpoint: each pair gives the same numbers and tokens."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoint import save
from opt_core.weights import Head
from tests.cases import HEADS, SWITCHES, Batch, padded, random_weights, tiny, words
from tests.subject import STD
from tests.tolerances import assert_near
from tests.wings import FRAMEWORKS, Wing, is_installed, open_wing

MISSING = [name for name in FRAMEWORKS if not is_installed(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not all wings can be imported: {', '.join(MISSING)}"
)
PAIRS = list(itertools.combinations(FRAMEWORKS, 2))


@pytest.fixture(scope="module")
def wings() -> dict[str, Wing]:
    return {name: open_wing(name) for name in FRAMEWORKS}


def written(folder: Path, head: Head, switch: str, **options: Any) -> Path:
    config = tiny(**SWITCHES[switch])
    extra = {"config.json": config.to_json_string().encode()}
    save(folder, random_weights(config, head, **options), extra_files=extra)
    return folder


def batch() -> Batch:
    return padded([words(1, length, length)[0] for length in (3, 7, 5)], "left")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected", "no_bias", "untied"])
def test_each_pair_of_wings_computes_the_same_from_one_checkpoint(
    wings: dict[str, Wing], tmp_path: Path, head: Head, switch: str
) -> None:
    folder, given = written(tmp_path, head, switch), batch()
    outputs = {
        name: wing.call(wing.load(head, folder), **given.inputs, output_hidden_states=True)
        for name, wing in wings.items()
    }
    for one, other in PAIRS:
        for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
            if name in outputs[one]:
                where = ... if head is Head.SEQUENCE_CLASSIFICATION else given.shown
                found, right = outputs[one][name], outputs[other][name]
                assert_near(found, right, where=where, what=f"{name} of {one} beside {other}")
        states = zip(outputs[one].hidden_states, outputs[other].hidden_states, strict=True)
        for found, right in states:
            assert_near(found, right, where=given.shown, what=f"a state of {one} beside {other}")


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 5, "top_p": 0.9}])
def test_each_pair_of_wings_chooses_the_same_tokens(
    wings: dict[str, Wing], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, given = written(tmp_path, Head.CAUSAL_LM, "pre_norm", std=STD), batch()
    tokens = {
        name: wing.generate(
            wing.load(Head.CAUSAL_LM, folder),
            given.ids,
            attention_mask=given.mask,
            max_new_tokens=12,
            **options,
        )
        for name, wing in wings.items()
    }
    for one, other in PAIRS:
        np.testing.assert_array_equal(tokens[one], tokens[other], err_msg=f"{one}, {other}")


@pytest.mark.parametrize(("writer", "reader"), list(itertools.permutations(FRAMEWORKS, 2)))
def test_what_one_wing_saves_another_loads_bit_by_bit(
    wings: dict[str, Wing], tmp_path: Path, writer: str, reader: str
) -> None:
    source = written(tmp_path / "source", Head.CAUSAL_LM, "post_norm_projected")
    model = wings[writer].load(Head.CAUSAL_LM, source)
    model.save_pretrained(tmp_path / "saved")
    before = wings[writer].weights(model)
    after = wings[reader].weights(wings[reader].load(Head.CAUSAL_LM, tmp_path / "saved"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
