"""What computes: the table of wings, and the few things that commands ask of each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.cli import terminal
from opt_core.cli.continuing import Ints, Sequences, listed, native_options
from opt_core.config import DTYPES, OPTConfig

if TYPE_CHECKING:
    from opt_core.generation import GenerationConfig
    from opt_core.tokenizer import OPTTokenizer

Scores = NDArray[np.floating[Any]]


class Backend(Protocol):
    """A causal language model, computed by one framework."""

    @property
    def config(self) -> OPTConfig:
        """The model's configuration."""

    @property
    def model(self) -> Any:
        """What another backend of the same kind takes as `assistant_model`."""

    def logits(self, ids: Ints, mask: Ints | None = None) -> Scores:
        """`[B, T] int -> [B, T, V]` float32 or float64: the scores of what follows each token.

        `mask` is 0 for padding, as `attention_mask` of every model.
        """

    def tokens(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Iterator[int]:
        """Continue `[1, P]` token by token; options are those of `GenerationConfig`.

        Besides, `assistant_model` is a backend of the same kind, and `negative_prompt_ids` are
        `[1, P]`. Ids that the tokenizer lacks are never chosen.

        Raises:
            ValueError: a bad option, or no room for the tokens asked for; with the first token.
        """

    def sequences(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Sequences:
        """As `tokens`, all new ones of every returned sequence, and the scores of beams.

        Raises:
            ValueError: a bad option, or no room for the tokens asked for.
        """


class Wing(NamedTuple):
    """One row of the table: the module that must be there, what brings it, and how it loads."""

    title: str
    module: str
    #: The extra of the distribution that installs the module.
    extra: str
    #: From a folder or file, the name of a type or None, and a device or None.
    load: Callable[[Path, str | None, str | None], Backend]
    #: Computes on one thread for a while: for tiny models more threads cost more than they bring.
    one_thread: Callable[[], AbstractContextManager[None]]

    @property
    def is_installed(self) -> bool:
        """Whether the framework can be imported here."""
        return find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """The framework's version, by which results are reported."""
        return version(self.module)


class NumpyReference:
    """The float64 reference on a checkpoint."""

    def __init__(self, source: Path) -> None:
        from conversion import open_checkpoint
        from opt_core.generation import GENERATION_FILE, GenerationConfig
        from opt_core.weights import Head, fit

        self.config = OPTConfig.from_pretrained(source)
        checkpoint = open_checkpoint(source)
        matched = fit(self.config, Head.CAUSAL_LM, checkpoint.tensors, source=str(source))
        self.weights = {
            name: np.asarray(tensor.map(), np.float64) for name, tensor in matched.sources.items()
        }
        beside = source if source.is_dir() else source.parent
        if (beside / GENERATION_FILE).is_file():
            self.generation = GenerationConfig.from_pretrained(beside)
        else:
            self.generation = GenerationConfig.from_model_config(self.config)

    def logits(self, ids: Ints, mask: Ints | None = None) -> Scores:
        """As `Backend.logits`, float64."""
        from opt_core.reference import causal_lm

        return causal_lm(self.config, self.weights, input_ids=ids, attention_mask=mask).logits

    def tokens(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Iterator[int]:
        """As `Backend.tokens`, one pass over the whole text for each token."""
        return (token for token, _ in self.tokens_with_margins(prompt, tokenizer, options))

    def tokens_with_margins(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Iterator[tuple[int, float]]:
        """Each token, and the smallest change that could have made it another one."""
        from opt_core.reference import stream

        asked, given = self._asked(prompt, tokenizer, options)
        steps = stream(self.config, self.weights, prompt, np.ones_like(prompt), asked, **given)
        return ((int(tokens[0]), float(margins[0])) for tokens, margins in steps)

    def sequences(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Sequences:
        """As `Backend.sequences`."""
        from opt_core.reference import record

        asked, given = self._asked(prompt, tokenizer, options)
        found = record(self.config, self.weights, prompt, np.ones_like(prompt), asked, **given)
        return listed(found.sequences, found.sequences_scores, prompt)

    def _asked(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The options, and what the reference takes besides."""
        from opt_core.reference import Call

        native = native_options(options, prompt, lambda array: array)
        del native["attention_mask"]
        assistant = native.pop("assistant_model", None)
        arrays = {n: native.pop(n) for n in list(native) if n.startswith("negative_prompt")}
        call = Call(assistant=assistant, tokenizer=tokenizer, **arrays)
        return self.generation.merged(**native), {"known": len(tokenizer), "call": call}

    @property
    def model(self) -> tuple[OPTConfig, Any]:
        """The configuration and the weights, which are all that a model is to the reference."""
        return self.config, self.weights


class TorchModel:
    """The PyTorch wing on a checkpoint."""

    def __init__(self, source: Path, dtype: str | None, device: str | None) -> None:
        from opt_torch import OPTForCausalLM

        self.model = OPTForCausalLM.from_pretrained(source, dtype=dtype, device=device)
        self.config = self.model.config

    def logits(self, ids: Ints, mask: Ints | None = None) -> Scores:
        """As `Backend.logits`, float32 whatever the model computes in."""
        import torch

        with torch.inference_mode():
            device = self.model.device
            given = torch.from_numpy(ids).to(device)
            shown = None if mask is None else torch.from_numpy(mask).to(device)
            out = self.model(given, attention_mask=shown, use_cache=False)
            scores: Scores = out.logits.float().cpu().numpy()
        return scores

    def tokens(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Iterator[int]:
        """As `Backend.tokens`, over a cache."""
        import torch

        given = torch.from_numpy(prompt).to(self.model.device)
        steps = self.model.stream(given, tokenizer=tokenizer, **self._native(options, given))
        return (int(tokens[0]) for tokens in steps)

    def sequences(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Sequences:
        """As `Backend.sequences`."""
        import torch

        given = torch.from_numpy(prompt).to(self.model.device)
        record: Any = self.model.generate(
            given,
            tokenizer=tokenizer,
            return_dict_in_generate=True,
            **self._native(options, given),
        )
        scores = record.sequences_scores
        return listed(
            record.sequences.cpu().numpy(),
            None if scores is None else scores.cpu().numpy(),
            prompt,
        )

    def _native(self, options: Mapping[str, Any], prompt: Any) -> dict[str, Any]:
        import torch

        return native_options(options, prompt, lambda a: torch.from_numpy(a).to(self.model.device))


class TfModel:
    """The Keras wing on a checkpoint."""

    def __init__(self, source: Path, dtype: str | None, device: str | None) -> None:
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # and no notes later
        with terminal.notes_held_back():
            import tensorflow as tf

            from opt_tf import TFOPTForCausalLM

            tf.zeros(())  # the first operation looks for devices
        self.device = device
        with tf.device(device):
            self.model = TFOPTForCausalLM.from_pretrained(source, dtype=dtype)
        self.config = self.model.config

    def logits(self, ids: Ints, mask: Ints | None = None) -> Scores:
        """As `Backend.logits`, float32 whatever the model computes in."""
        import tensorflow as tf

        with tf.device(self.device):
            shown = None if mask is None else tf.constant(mask)
            out = self.model(input_ids=tf.constant(ids), attention_mask=shown, use_cache=False)
            scores: Scores = tf.cast(out.logits, tf.float32).numpy()
        return scores

    def tokens(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Iterator[int]:
        """As `Backend.tokens`, over a cache."""
        import tensorflow as tf

        with tf.device(self.device):
            given = tf.constant(prompt)
            native = native_options(options, given, tf.constant)
            steps = self.model.stream(given, tokenizer=tokenizer, **native)
            yield from (int(tokens[0]) for tokens in steps)

    def sequences(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Sequences:
        """As `Backend.sequences`."""
        import tensorflow as tf

        with tf.device(self.device):
            given = tf.constant(prompt)
            native = native_options(options, given, tf.constant)
            record: Any = self.model.generate(
                given, tokenizer=tokenizer, return_dict_in_generate=True, **native
            )
            return listed(record.sequences, record.sequences_scores, prompt)


class FlaxModel:
    """The Flax wing on a checkpoint."""

    def __init__(self, source: Path, dtype: str | None, device: str | None) -> None:
        import jax

        from opt_flax import FlaxOPTForCausalLM

        self.device = None if device is None else jax.devices(device)[0]
        with jax.default_device(self.device):
            self.model = FlaxOPTForCausalLM.from_pretrained(source, dtype=dtype)
        self.config = self.model.config

    def logits(self, ids: Ints, mask: Ints | None = None) -> Scores:
        """As `Backend.logits`, float32 whatever the model computes in."""
        import jax

        with jax.default_device(self.device):
            shown = None if mask is None else mask.astype(np.int32)
            out = self.model(ids.astype(np.int32), attention_mask=shown, use_cache=False)
            return np.asarray(out.logits, np.float32)

    def tokens(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Iterator[int]:
        """As `Backend.tokens`, over a cache."""
        import jax

        with jax.default_device(self.device):
            given = prompt.astype(np.int32)
            native = native_options(options, given, lambda a: a.astype(np.int32))
            steps = self.model.stream(given, tokenizer=tokenizer, **native)
            yield from (int(tokens[0]) for tokens in steps)

    def sequences(
        self, prompt: Ints, tokenizer: OPTTokenizer, options: Mapping[str, Any]
    ) -> Sequences:
        """As `Backend.sequences`."""
        import jax

        with jax.default_device(self.device):
            given = prompt.astype(np.int32)
            native = native_options(options, given, lambda a: a.astype(np.int32))
            record: Any = self.model.generate(
                given, tokenizer=tokenizer, return_dict_in_generate=True, **native
            )
            return listed(record.sequences, record.sequences_scores, prompt)


@contextmanager
def _torch_on_one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_it_is() -> AbstractContextManager[None]:
    """TensorFlow and XLA take their threads once, when they start."""
    return nullcontext()


#: The reference's name, beside those of the wings.
NUMPY = "numpy"

#: Every wing by the name that `--backend` takes; the first that is installed is the default.
WINGS: Mapping[str, Wing] = {
    "torch": Wing("PyTorch", "torch", "torch", TorchModel, _torch_on_one_thread),
    "tf": Wing("TensorFlow", "tensorflow", "tensorflow", TfModel, _as_it_is),
    "flax": Wing("Flax", "flax", "flax", FlaxModel, _as_it_is),
}


def installed() -> list[str]:
    """The wings whose framework is installed."""
    return [name for name, wing in WINGS.items() if wing.is_installed]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What computes, in which type, and where."""
    parser.add_argument(
        "--backend",
        choices=[*WINGS, NUMPY],
        help="what computes (the first of these that is installed)",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        help="compute in this type (float32); auto: the file's",
    )
    parser.add_argument("--device", help="compute there, such as cuda (the framework's default)")


def load(options: argparse.Namespace, source: Path) -> Backend:
    """The model of a local checkpoint in the backend that was chosen.

    Raises:
        ImportError: the framework is not installed; says which extra brings it.
        ValueError: a type or a device for the reference, which has neither.
        CheckpointError: the checkpoint cannot be used.
    """
    name = options.backend or next(iter(installed()), NUMPY)
    if name == NUMPY:
        given = [f"--{n}" for n in ("dtype", "device") if getattr(options, n) is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} cannot be honoured: NumPy computes in float64 on the CPU; "
                "leave it out, or choose another --backend"
            )
        return NumpyReference(source)
    wing = WINGS[name]
    if not wing.is_installed:
        raise ImportError(
            f"--backend {name} needs {wing.title}, which is not installed: "
            f"pip install 'optlm[{wing.extra}]'"
        )
    return wing.load(source, options.dtype, options.device)
