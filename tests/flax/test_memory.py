"""Memory: loading holds little more than the weights, and a file never changes."""

import gc
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from opt_core.checkpoint import save
from opt_core.config import OPTConfig
from opt_core.weights import Head, table
from tests.cases import random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

#: The growth of anonymous memory allowed, as a part of the weights as they are loaded.
ALLOWED = 1.3
#: Loads a folder while a thread watches; prints the peak and the end, in bytes above the start.
WATCH = """
import gc, sys, threading
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType
from opt_flax import FlaxOPTForCausalLM

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

count = int(sys.argv[4])
mesh = None
if count > 1:
    mesh = jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,))
small = None if mesh is None else jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
# A small one first: what loading needs at all.
jax.block_until_ready(FlaxOPTForCausalLM.from_pretrained(sys.argv[1], mesh=small).params)
gc.collect()
start, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = FlaxOPTForCausalLM.from_pretrained(sys.argv[2], sys.argv[3], mesh=mesh)
jax.block_until_ready(model.params)
done.set()
thread.join()
print(max(peak, anonymous()) - start, anonymous() - start)
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def write(folder: Path, config: OPTConfig, dtype: str) -> int:
    """Random weights of a configuration as a file; how many there are."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.random(row.shape, np.float32).astype(dtype)
        for name, row in table(config).items()
    }
    save(folder, tensors, extra_files={"config.json": config.to_json_string().encode()})
    return sum(values.size for values in tensors.values())


@linux
@pytest.mark.parametrize(
    ("stored", "wanted", "devices"),
    [("float32", "float32", 1), ("float16", "float32", 1), ("float32", "float32", 4)],
)
def test_loading_takes_little_more_memory_than_the_weights(
    tmp_path: Path, stored: str, wanted: str, devices: int
) -> None:
    # Half the layers: the ratio is the same, and the suite sooner done.
    config = OPTConfig.preset("125m").replace(num_hidden_layers=6)
    write(tmp_path / "small", tiny(), "float32")
    size = write(tmp_path / "large", config, stored) * np.dtype(wanted).itemsize
    paths = [str(tmp_path / name) for name in ("small", "large")]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *paths, wanted, str(devices)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(tmp_path / "large")
    assert done.returncode == 0, done.stderr
    peak, end = map(int, done.stdout.split())
    assert peak < ALLOWED * size, (peak / size, end / size)


def test_training_a_loaded_model_never_changes_its_file(wing: Wing, tmp_path: Path) -> None:
    wing.build(Head.CAUSAL_LM, tiny(), random_weights(tiny(), Head.CAUSAL_LM)).save_pretrained(
        tmp_path
    )
    before = digest(tmp_path)
    model, witness = (wing.load(Head.CAUSAL_LM, tmp_path) for _ in range(2))
    ids = words(2, 6)
    untouched = witness(ids).logits
    # Buffers that are given up are written over.
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    model.params = step(jax.tree.map(lambda leaf: leaf, model.params))
    assert (model(ids).logits != untouched).any()
    np.testing.assert_array_equal(witness(ids).logits, untouched)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_a_model_outlives_its_file(wing: Wing, tmp_path: Path, dtype: Any) -> None:
    built = wing.build(Head.CAUSAL_LM, tiny(), random_weights(tiny(), Head.CAUSAL_LM))
    built.save_pretrained(tmp_path)
    model = wing.load(Head.CAUSAL_LM, tmp_path, dtype=dtype)
    for path in tmp_path.iterdir():
        path.unlink()
    found, right = (wing.call(one, input_ids=words(2, 6)).logits for one in (model, built))
    assert_near(found, right, "half" if dtype == "bfloat16" else "same program")


def live() -> int:
    gc.collect()
    return len(jax.live_arrays())


def test_repeated_passes_keep_no_arrays(wing: Wing) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())

    def use() -> None:
        past = model(words(2, 6)).past_key_values
        jax.block_until_ready(model(words(2, 1), past_key_values=past))
        model.generate(words(2, 6), max_new_tokens=4)

    use()
    before = live()
    for _ in range(3):
        use()
    assert live() == before
