"""One peer of the benchmark: reads the name of a case a line, answers with a JSON line."""

from __future__ import annotations

import json
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opt_core import __version__
from tests.benchmarks.compiled import (
    WAYS,
    KerasHub,
    OursOnJax,
    OursOnKeras,
    TransformersOnJax,
    TransformersOnKeras,
)

SHAPES = {
    "prefill-1x512": (1, 512),
    "prefill-8x128": (8, 128),
    "decode-1": (1, 32),
    "decode-8": (8, 32),
    "beam-4": (1, 32),
    "contrastive": (1, 32),
    "assisted": (1, 32),
    "train-4x256": (4, 256),
}
#: How many tokens follow, and how they are chosen.
DECODING = {
    "decode-1": (128, "greedy"),
    "decode-8": (128, "greedy"),
    "beam-4": (64, "beams"),
    "contrastive": (64, "contrastive"),
    "assisted": (64, "assisted"),
}


class System(Protocol):
    """What a peer offers; a case that it cannot do raises `LookupError`."""

    facts: dict[str, Any]

    def load(self) -> None:
        """Import and load, so that a pass can follow; the framework itself is imported before."""

    def prefill(self, ids: np.ndarray[Any, Any]) -> None:
        """All logits of one pass."""

    def decode(self, ids: np.ndarray[Any, Any], count: int, way: str) -> None:
        """Exactly `count` new tokens a row, chosen in one of the `compiled.WAYS`."""

    def train(self, ids: np.ndarray[Any, Any]) -> None:
        """One step of AdamW."""


class Torch(ABC):
    """What our model and transformers' have in common: both are torch modules."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.folder, self.dtype = torch, folder, getattr(torch, dtype)
        self.facts = {"torch": torch.__version__, "dtype": dtype}
        self.model: Any = None
        self.optimizer: Any = None

    @abstractmethod
    def _load(self, name: str) -> Any:
        """A model of the folder of checkpoints."""

    def load(self) -> None:
        self.model = self._load("hf")

    def _options(self, way: str) -> dict[str, Any]:
        """Both take the same options, and an assistant as a model of their own."""
        drafts = {"assistant_model": self._assistant} if way == "assisted" else {}
        return {**WAYS[way], **drafts}

    @cached_property
    def _assistant(self) -> Any:
        return self._load("assistant")

    def prefill(self, ids: np.ndarray[Any, Any]) -> None:
        with self.torch.no_grad():
            self.model(self.torch.from_numpy(ids), use_cache=True)

    def train(self, ids: np.ndarray[Any, Any]) -> None:
        if self.dtype is not self.torch.float32:
            raise LookupError("float32 only")
        if self.optimizer is None:
            self.model.train()
            self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        batch = self.torch.from_numpy(ids)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(batch, labels=batch, use_cache=False).loss.backward()
        self.optimizer.step()


class Ours(Torch):
    """opt_torch."""

    def __init__(self, folder: Path, threads: int, dtype: str, precision: str = "highest") -> None:
        super().__init__(folder, threads, dtype)
        self.torch.set_float32_matmul_precision(precision)
        self.facts |= {"optlm": __version__, "matmul_precision": precision}

    def _load(self, name: str) -> Any:
        from opt_torch import OPTForCausalLM

        return OPTForCausalLM.from_pretrained(self.folder / name, dtype=self.dtype)

    def decode(self, ids: np.ndarray[Any, Any], count: int, way: str) -> None:
        self.model.generate(
            self.torch.from_numpy(ids),
            max_new_tokens=count,
            eos_token_id=None,
            **self._options(way),
        )


class Transformers(Torch):
    """transformers' OPT for torch."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        super().__init__(folder, threads, dtype)
        self.facts |= {"transformers": version("transformers")}

    def _load(self, name: str) -> Any:
        from transformers import OPTForCausalLM

        return OPTForCausalLM.from_pretrained(self.folder / name, dtype=self.dtype).eval()

    def decode(self, ids: np.ndarray[Any, Any], count: int, way: str) -> None:
        if way == "contrastive":
            raise LookupError("transformers 5 has no contrastive search of its own")
        batch = self.torch.from_numpy(ids)
        self.model.generate(
            batch,
            attention_mask=self.torch.ones_like(batch),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            **self._options(way),
        )


class CTranslate2:
    """CTranslate2 on the model that its own converter made."""

    def __init__(self, folder: Path, threads: int, compute_type: str) -> None:
        import ctranslate2

        self.package, self.threads, self.compute_type = ctranslate2, threads, compute_type
        self.folder = folder / "ct2"
        self.facts = {"ctranslate2": ctranslate2.__version__, "dtype": compute_type}

    def load(self) -> None:
        self.generator = self.package.Generator(
            str(self.folder), compute_type=self.compute_type, intra_threads=self.threads
        )

    def prefill(self, ids: np.ndarray[Any, Any]) -> None:
        self.generator.forward_batch(_words(ids))

    def decode(self, ids: np.ndarray[Any, Any], count: int, way: str) -> None:
        if way not in ("greedy", "beams"):
            raise LookupError(f"CTranslate2 has no {way} decoding")
        self.generator.generate_batch(
            _words(ids),
            max_length=count,
            min_length=count,
            beam_size=WAYS[way].get("num_beams", 1),
            include_prompt_in_result=False,
        )

    def train(self, ids: np.ndarray[Any, Any]) -> None:
        raise LookupError("CTranslate2 does not train")


def _words(ids: np.ndarray[Any, Any]) -> list[list[str]]:
    """CTranslate2 takes tokens by name."""
    return [[f"t{i}" for i in row] for row in ids.tolist()]


SYSTEMS: dict[str, Callable[[Path, int], System]] = {
    "opt_torch": lambda folder, n: Ours(folder, n, "float32"),
    "opt_torch-medium": lambda folder, n: Ours(folder, n, "float32", "medium"),
    "opt_torch-bf16": lambda folder, n: Ours(folder, n, "bfloat16"),
    "opt_tf": lambda folder, n: OursOnKeras(folder, n, "float32"),
    "opt_tf-bf16": lambda folder, n: OursOnKeras(folder, n, "bfloat16"),
    "opt_flax": lambda folder, n: OursOnJax(folder, "float32"),
    "opt_flax-bf16": lambda folder, n: OursOnJax(folder, "bfloat16"),
    "keras_hub-tf": lambda folder, n: KerasHub("tensorflow", n),
    "keras_hub-jax": lambda folder, n: KerasHub("jax", n),
    "transformers": lambda folder, n: Transformers(folder, n, "float32"),
    "transformers-bf16": lambda folder, n: Transformers(folder, n, "bfloat16"),
    "transformers-tf": TransformersOnKeras,
    "transformers-flax": lambda folder, n: TransformersOnJax(folder),
    "ctranslate2": lambda folder, n: CTranslate2(folder, n, "float32"),
    "ctranslate2-int8": lambda folder, n: CTranslate2(folder, n, "int8"),
}


def prepare(folder: Path) -> None:
    """Write what all peers read: the 125M shape, random weights, seed 0; and an assistant.

    The assistant is the first two layers of the model. The other ten add a tenth of what they
    would, so that the assistant guesses most tokens right, as one does that was trained on the
    same texts.
    """
    import torch

    from opt_torch import OPTConfig, OPTForCausalLM

    if (folder / "ct2").exists() and (folder / "assistant").exists():
        return
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig())
    with torch.no_grad():
        layers: Any = model.model.decoder.layers[2:]
        for layer in layers:
            layer.self_attn.out_proj.weight *= 0.1
            layer.fc2.weight *= 0.1
    model.save_pretrained(folder / "hf")
    assistant = OPTForCausalLM(OPTConfig(num_hidden_layers=2))
    assistant.load_state_dict({n: model.state_dict()[n] for n in assistant.state_dict()})
    assistant.save_pretrained(folder / "assistant")
    name_tokens(folder / "hf")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"), force=True)


def name_tokens(folder: Path) -> None:
    """A tokenizer of made-up words, which CTranslate2's converter wants beside the weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = special + [f"t{i}" for i in range(len(special), 50272)]
    known = {word: i for i, word in enumerate(words)}
    kind: Any = PreTrainedTokenizerFast
    kind(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="<unk>")),
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def run(system: System, case: str) -> dict[str, Any]:
    """One measurement of one case."""
    if case == "load":
        return {"ms": _timed(system.load)}
    if not getattr(system, "is_loaded", False):
        with suppress(LookupError):  # a peer that reads no such checkpoint builds its own
            system.load()
        system.is_loaded = True  # type: ignore[attr-defined]
    ids = np.random.default_rng(0).integers(10, 50000, SHAPES[case])
    if case.startswith("prefill"):
        return {"ms": _timed(lambda: system.prefill(ids))}
    if case.startswith("train"):
        return {"ms": _timed(lambda: system.train(ids))}
    count, way = DECODING[case]
    return {"ms": _timed(lambda: system.decode(ids, count, way)) / count}


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """`NAME FOLDER THREADS`, or `prepare FOLDER 1`."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if name == "prepare":
        prepare(folder)
        return
    system = SYSTEMS[name](folder, threads)
    for line in sys.stdin:
        try:
            answer = run(system, line.strip())
        except LookupError as why:
            answer = {"skip": str(why)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({**answer, **system.facts, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
