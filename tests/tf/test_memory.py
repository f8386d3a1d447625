"""Memory: loading takes little more than the weights, and calls keep nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from opt_core.checkpoint import save
from opt_core.config import OPTConfig
from opt_core.weights import Head, table
from tests.cases import random_weights, tiny, words
from tests.wings import Wing

#: The growth of anonymous memory allowed, as a part of the weights.
ALLOWED = 1.2
#: Large blocks go back to the system when they are freed, so that what is held is what is seen;
#: else glibc keeps up to 64 MB of them, a third of the weights here.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
#: Loads a folder while a thread watches; prints the peak and the end, in bytes above the start.
WATCH = """
import gc, sys, threading
import opt_tf

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

opt_tf.TFOPTForCausalLM.from_pretrained(sys.argv[1])  # a small one: what loading needs at all
gc.collect()
start, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = opt_tf.TFOPTForCausalLM.from_pretrained(sys.argv[2], dtype=sys.argv[3])
done.set()
thread.join()
print(max(peak, anonymous()) - start, anonymous() - start)
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def write(folder: Path, config: OPTConfig, dtype: str) -> None:
    """Random weights of a configuration as a file."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.random(row.shape, np.float32).astype(dtype)
        for name, row in table(config).items()
    }
    save(folder, tensors, extra_files={"config.json": config.to_json_string().encode()})


@linux
@pytest.mark.parametrize(("stored", "wanted"), [("float16", "float32"), ("float16", "auto")])
def test_loading_peaks_below_its_share_of_the_weights(
    tmp_path: Path, stored: str, wanted: str
) -> None:
    write(tmp_path / "small", tiny(), "float32")
    # Wide, with few layers: the largest tensor is a tenth of all, as in OPT-1.3B.
    config = OPTConfig.preset("125m").replace(vocab_size=12000)
    write(tmp_path / "large", config, stored)
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path / "small"), str(tmp_path / "large"), wanted],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **GIVEN_BACK},
    )
    assert done.returncode == 0, done.stderr
    peak, end = map(int, done.stdout.split())
    width = 4 if wanted == "float32" else 2
    weights = width * sum(row.size for row in table(config).values())
    assert peak < ALLOWED * weights
    assert end < ALLOWED * weights


def test_repeated_calls_keep_nothing(wing: Wing) -> None:
    config = tiny()
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))

    def once() -> None:
        past = model(words(2, 6)).past_key_values
        model(words(2, 1), past_key_values=past)

    def living() -> int:
        gc.collect()
        # By type, since to ask the objects of other libraries for their class may make them warn.
        return sum(issubclass(type(thing), tf.Tensor) for thing in gc.get_objects())

    once()
    before, calls = living(), 10
    for _ in range(calls):
        once()
    # Whatever else this process has done may leave or lose one meanwhile.
    assert living() < before + calls


def test_a_model_that_nobody_holds_goes_away(wing: Wing) -> None:
    import weakref

    config = tiny()
    model = wing.build(Head.CAUSAL_LM, config, random_weights(config, Head.CAUSAL_LM))
    model(words(2, 6), training=True)
    model.compile("sgd", run_eagerly=True)
    model.fit({"input_ids": words(2, 6), "labels": words(2, 6)}, verbose=0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
