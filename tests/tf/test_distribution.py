"""`tf.distribute.MirroredStrategy` on two virtual devices, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opt_core.weights import Head
from tests.cases import random_weights, tiny
from tests.wings import Wing

#: Trains and evaluates the same model alone and mirrored; prints what came out as JSON.
PROGRAM = """
import json, sys
import numpy as np
import tensorflow as tf

device = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import opt_tf

folder = sys.argv[1]
rng = np.random.default_rng(0)
ids = rng.integers(3, 40, (8, 6))
x = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

def run(strategy):
    found = {}
    with strategy.scope():
        model = opt_tf.TFOPTForCausalLM.from_pretrained(folder)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices({**x, "labels": ids}).batch(4)
    found["replicas"] = strategy.num_replicas_in_sync
    found["losses"] = model.fit(data, epochs=2, verbose=0, shuffle=False).history["loss"]
    in_y = tf.data.Dataset.from_tensor_slices((x, ids)).batch(4)
    found["evaluated"] = model.evaluate(in_y, verbose=0)
    logits = model.predict(tf.data.Dataset.from_tensor_slices(x).batch(4), verbose=0)["logits"]
    found["logits"] = logits.tolist()
    found["weights"] = [v.numpy().tolist() for v in model.trainable_variables]
    tokens = model.generate(ids[:2], max_new_tokens=4, eos_token_id=None, compiled=False)
    found["tokens"] = tokens.numpy().tolist()
    with strategy.scope():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss=loss, metrics=["accuracy"], jit_compile=False)
    found["compiled"] = model.fit(in_y, verbose=0, shuffle=False).history
    model.save_pretrained(folder + "/" + str(found["replicas"]))
    return found

alone = run(tf.distribute.OneDeviceStrategy("/cpu:0"))
mirrored = run(tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]))
print(json.dumps([alone, mirrored]))
"""


@pytest.fixture(scope="module")
def runs(wing: Wing, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    config = tiny(dropout=0.0, num_hidden_layers=1)
    weights = random_weights(config, Head.CAUSAL_LM)
    wing.build(Head.CAUSAL_LM, config, weights).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone, mirrored = json.loads(done.stdout.splitlines()[-1])
    return alone, mirrored, folder


def flat(values: Any) -> list[float]:
    if isinstance(values, list):
        return [x for value in values for x in flat(value)]
    return [values]


def test_two_devices_train_as_one(runs: tuple[Any, Any, Path]) -> None:
    alone, mirrored, _ = runs
    assert (alone["replicas"], mirrored["replicas"]) == (1, 2)
    assert mirrored["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert flat(mirrored["weights"]) == pytest.approx(flat(alone["weights"]), abs=1e-6)


def test_two_devices_evaluate_and_predict_as_one(runs: tuple[Any, Any, Path]) -> None:
    alone, mirrored, _ = runs
    assert mirrored["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)
    assert flat(mirrored["logits"]) == pytest.approx(flat(alone["logits"]), abs=1e-5)


def test_a_compiled_loss_trains_on_two_devices_as_on_one(runs: tuple[Any, Any, Path]) -> None:
    alone, mirrored, _ = runs
    assert set(mirrored["compiled"]) == {"loss", "accuracy"}
    assert mirrored["compiled"]["loss"] == pytest.approx(alone["compiled"]["loss"], rel=1e-5)


def test_a_mirrored_model_generates_and_is_saved(wing: Wing, runs: tuple[Any, Any, Path]) -> None:
    _, mirrored, folder = runs
    assert [len(row) for row in mirrored["tokens"]] == [10, 10]
    assert wing.load(Head.CAUSAL_LM, folder / "2").config.vocab_size == 40
