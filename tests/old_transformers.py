"""Holds our `tf` and `flax` files to transformers 4.53.3, which has TensorFlow and Flax classes.

In an environment of optlm: `python -m tests.old_transformers make FOLDER` converts small models.
In one with transformers 4.53.3, torch, tensorflow < 2.19, tf-keras, flax and jax:
`python tests/old_transformers.py check FOLDER` opens each of them there, without optlm, and
compares outputs with the float64 reference. docs/conversion.md says what came out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

#: Largest error as a share of the largest value: float32, as everywhere.
BOUND = 1e-5


def make(folder: Path) -> None:
    """Convert models of every switch, type and kind of head that those classes have."""
    from conversion import convert
    from opt_core.weights import Head
    from tests.cases import expected, tiny, words
    from tests.test_convert import make as make_checkpoint

    switches: dict[str, dict[str, Any]] = {
        "pre_norm": {},
        "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
        "no_bias": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        "no_final_norm": {"_remove_final_layer_norm": True},
    }
    cases = []
    for switch, changes in switches.items():
        for head in (Head.NONE, Head.CAUSAL_LM):
            for dtype in ("float32", "float16", "bfloat16"):
                name, config = f"{switch}-{head.value}-{dtype}", tiny(**changes)
                source = folder / name / "source"
                weights = make_checkpoint(source, config, head)
                for to in ("tf", "flax"):
                    for size in (None, "4KB"):
                        target = folder / name / (to + ("-sharded" if size else ""))
                        convert(source, target, to=to, dtype=dtype, max_shard_size=size)
                        cases.append({"path": str(target.relative_to(folder)), "to": to})
                stored = {k: v.astype(_kind(dtype)).astype(np.float32) for k, v in weights.items()}
                ids = words(2, 7)
                key = "last_hidden_state" if head is Head.NONE else "logits"
                right = expected(head, config, stored, input_ids=ids)[key]
                np.savez(folder / name / "right.npz", ids=ids, right=right)
    (folder / "cases.json").write_text(json.dumps(cases))


def _kind(dtype: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def check(folder: Path) -> int:
    """Open every case with the class it is for; 1 if one is wrong."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import transformers

    wrong = 0
    cases = json.loads((folder / "cases.json").read_text())
    for case in cases:
        path = folder / case["path"]
        with np.load(path.parent / "right.npz") as arrays:
            ids, right = arrays["ids"], arrays["right"]
        name = ("TF" if case["to"] == "tf" else "Flax") + json.loads(
            (path / "config.json").read_text()
        )["architectures"][0]
        options = {"output_loading_info": True} if case["to"] == "tf" else {}
        loaded = getattr(transformers, name).from_pretrained(path, **options)
        model, info = loaded if case["to"] == "tf" else (loaded, {})
        output = model(ids.astype(np.int32))[0]
        error = float(np.max(np.abs(np.asarray(output, np.float64) - right)) / np.abs(right).max())
        missing = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ())]
        if error > BOUND or missing:
            wrong += 1
        print(f"{case['path']:45} {name:20} error {error:.1e} {missing or ''}", flush=True)
    print(f"transformers {transformers.__version__}: passed {len(cases) - wrong} of {len(cases)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(check(Path(sys.argv[2])))
