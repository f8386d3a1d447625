"""What `import opt_tf` says when Keras runs on another backend, or is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, whose Keras is not configured yet."""
    kept = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "KERAS_HOME")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )


@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.deep)])
def test_another_backend_of_keras_is_refused_with_what_to_set(backend: str) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    done = run("import opt_tf", KERAS_BACKEND=backend)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: opt_tf computes with TensorFlow, but Keras runs on {backend}: set "
        "KERAS_BACKEND=tensorflow before keras is imported"
    )


def test_a_backend_that_keras_reads_from_its_own_file_is_refused_too(tmp_path: Path) -> None:
    if find_spec("jax") is None:
        pytest.skip("jax is not installed")
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert "Keras runs on jax" in run("import opt_tf", KERAS_HOME=str(tmp_path)).stderr
    again = run("import opt_tf", KERAS_HOME=str(tmp_path), KERAS_BACKEND="tensorflow")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("missing", ["tensorflow", "keras"])
def test_without_tensorflow_the_error_says_what_to_install(missing: str) -> None:
    done = run(f"import sys; sys.modules[{missing!r}] = None; import opt_tf")
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: opt_tf needs TensorFlow, which is not installed: "
        "pip install 'optlm[tensorflow]'"
    )
