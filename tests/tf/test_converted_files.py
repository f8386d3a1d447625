"""Files that the converter makes are opened by Keras, and those of Keras by the converter."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest

import opt_tf
from conversion import open_checkpoint
from opt_core.weights import Head
from tests.cases import HEADS, SWITCHES, tiny, words
from tests.wings import Wing
from tests.written import DTYPES, assert_holds, weights_of, write


def assert_weights(wing: Wing, model: Any, weights: Any) -> None:
    found = wing.weights(model)
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        np.testing.assert_array_equal(np.float32(found[name]), np.float32(wanted), err_msg=name)


@pytest.mark.parametrize(
    ("head", "dtype"),
    [(head, DTYPES[0]) for head in HEADS] + [(Head.CAUSAL_LM, dtype) for dtype in DTYPES[1:]],
)
def test_keras_opens_a_converted_model_and_we_what_keras_saves(
    wing: Wing, tmp_path: Path, head: Head, dtype: np.dtype[Any]
) -> None:
    config = tiny(num_labels=3)
    weights = weights_of(config, head, dtype)
    write(tmp_path, "keras", weights, config, head)
    model = keras.models.load_model(tmp_path / "model.keras")
    assert type(model) is getattr(opt_tf, f"TFOPT{head.value}")
    assert (model.config, model.dtype_policy.name) == (config, dtype.name)
    assert_weights(wing, model, weights)
    for name in ("model.keras", "model.weights.h5"):
        (tmp_path / name).unlink(missing_ok=True)
        if name == "model.keras":
            model.save(tmp_path / name)
        else:
            model.save_weights(tmp_path / name)
        assert_holds(tmp_path, "keras", weights)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("switch", SWITCHES)
def test_keras_opens_every_architecture(wing: Wing, tmp_path: Path, switch: str) -> None:
    config = tiny(**SWITCHES[switch])
    weights = weights_of(config, Head.CAUSAL_LM)
    write(tmp_path, "keras", weights, config)
    assert_weights(wing, keras.models.load_model(tmp_path / "model.keras"), weights)
    model = wing.fresh(Head.CAUSAL_LM, config)
    model.load_weights(tmp_path / "model.keras")
    assert_weights(wing, model, weights)


def test_the_description_is_what_keras_writes(wing: Wing, tmp_path: Path) -> None:
    config = tiny()
    write(tmp_path, "keras", weights_of(config, Head.CAUSAL_LM, ml_dtypes.bfloat16), config)
    ours = described(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras").save(tmp_path / "again.keras")
    theirs = described(tmp_path / "again.keras")
    for name in ("name", "attn_implementation", "generation_config"):
        theirs["config"].pop(name)
    assert ours == theirs


def described(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def test_weights_that_were_trained_are_read_without_the_state_of_training(
    wing: Wing, tmp_path: Path
) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    model.compile(keras.optimizers.AdamW(1e-3), run_eagerly=True)
    model.fit({"input_ids": words(2, 4), "labels": words(2, 4)}, verbose=0)
    model.save(tmp_path / "model.keras")
    assert_holds(tmp_path, "keras", wing.weights(model))
    assert len(open_checkpoint(tmp_path).left_out) > 36 * 2
    (tmp_path / "model.keras").unlink()
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=1e-5)
    assert len(open_checkpoint(tmp_path).files) > 3
    assert_holds(tmp_path, "keras", wing.weights(model))


def test_a_model_is_made_of_a_file_of_weights_alone(wing: Wing, tmp_path: Path) -> None:
    config = tiny()
    weights = weights_of(config, Head.CAUSAL_LM)
    for name in ("tf", "keras"):
        write(tmp_path / name, name, weights, config)
        (tmp_path / name / "config.json").write_text(config.to_json_string())
        assert_weights(wing, wing.load(Head.CAUSAL_LM, tmp_path / name), weights)
