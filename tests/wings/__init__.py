"""One adapter a framework, NumPy in and NumPy out, so that a test is written once for all wings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import Arrays

#: The package of the framework that each wing needs.
FRAMEWORKS: Mapping[str, str] = {"torch": "torch", "tf": "tensorflow", "flax": "flax"}

#: XLA makes less of a program in less than half the time: for the tests of a wing and for the
#: examples of the pages. Tests that compare the wings or run the command compile as users do, and
#: so does the long version.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

#: Arrays among the arguments of `generate`, besides the prompt.
_ARRAYS = {"attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"}


class Wing(ABC):
    """What tests ask of a wing. A model, and the cache it returns, stay the framework's own."""

    name: str
    #: The name of attention that only some devices can run; None if the wing has none.
    fused: str | None = None
    #: Whether the functions of a call of `generate` can be traced into its programs.
    traces: bool = False

    @abstractmethod
    def model_class(self, head: Head) -> Any:
        """The public class with this head."""

    @abstractmethod
    def fresh(self, head: Head, config: OPTConfig, **options: Any) -> Any:
        """A model with values of its own, in evaluation mode."""

    @abstractmethod
    def build(
        self, head: Head, config: OPTConfig, weights: Arrays, dtype: str = "float32", **options: Any
    ) -> Any:
        """A model with these weights, by canonical name."""

    @abstractmethod
    def weights(self, model: Any) -> Arrays:
        """A model's weights by canonical name, in the stored layout and type."""

    @abstractmethod
    def call(self, model: Any, **inputs: Any) -> Any:
        """The outputs of a call, arrays as NumPy, the cache as it is."""

    @abstractmethod
    def modules(self, model: Any, **inputs: Any) -> Arrays:
        """The output of every module that runs in a call, by its path in a whole checkpoint."""

    @abstractmethod
    def gradients(self, model: Any, **inputs: Any) -> Arrays:
        """The gradients of a call's loss by canonical name."""

    @abstractmethod
    def array(self, values: Any) -> Any:
        """A NumPy array as the framework's own."""

    @abstractmethod
    def numpy(self, values: Any) -> Any:
        """Arrays of the framework, also in records and tuples, as NumPy (half types as float32)."""

    @abstractmethod
    def limit_threads(self) -> None:
        """Compute on one core: tiny models gain nothing from more, and wait for busy ones."""

    def load(self, head: Head, source: Any, **options: Any) -> Any:
        """A model from a checkpoint."""
        return self.model_class(head).from_pretrained(source, **options)

    def dtype(self, model: Any) -> str:
        """The type that a model computes in."""
        return str(model.dtype).rpartition(".")[2]

    def pairs(self, cache: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """The keys and values of every layer of a cache, `[B, H, S, D]`."""
        return [(self.numpy(key).copy(), self.numpy(value).copy()) for key, value in cache]

    def generate(self, model: Any, input_ids: Any = None, **options: Any) -> Any:
        """The tokens `[B, P + n]`, or the record if the options ask for one."""
        return self.numpy(model.generate(*self._prompt(input_ids, options), **options))

    def generate_lightly(self, model: Any, input_ids: Any = None, **options: Any) -> Any:
        """As `generate`, but compiled in less time, for what is run once or twice."""
        return self.generate(model, input_ids, **options)

    def stream(self, model: Any, input_ids: Any, **options: Any) -> Iterator[NDArray[Any]]:
        """The tokens `[B]` of each step, as they are chosen."""
        for tokens in model.stream(*self._prompt(input_ids, options), **options):
            yield self.numpy(tokens)

    def on_host(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """A function of two NumPy arrays as one of the framework's; it cannot be traced."""

        def wrapped(first: Any, second: Any) -> Any:
            found = function(np.asarray(self.numpy(first)), np.asarray(self.numpy(second)))
            return self.array(found) if isinstance(found, np.ndarray) else found

        return wrapped

    def traced(self, *, token: int, bias: float, vocab_size: int) -> tuple[Any, Any, Any]:
        """A processor, a criterion and a prefix function of three parameters, to be traced.

        They add the bias to a token, end a text after it, and allow every second token.
        """
        raise TypeError(f"the wing {self.name} traces no functions")

    def _prompt(self, input_ids: Any, options: dict[str, Any]) -> list[Any]:
        for name in _ARRAYS & options.keys():
            if options[name] is not None:
                options[name] = self.array(options[name])
        return [] if input_ids is None else [self.array(input_ids)]


def is_installed(name: str) -> bool:
    """Whether the framework of a wing can be imported."""
    return find_spec(FRAMEWORKS[name]) is not None


def open_wing(name: str) -> Wing:
    """The adapter of a wing by its name."""
    if name == "torch":
        from tests.wings.torch_wing import TorchWing

        return TorchWing()
    if name == "tf":
        from tests.wings.tf_wing import TfWing

        return TfWing()
    from tests.wings.flax_wing import FlaxWing

    return FlaxWing()
