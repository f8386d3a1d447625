"""The adapter of opt_torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import opt_torch
from opt_core.config import OPTConfig
from opt_core.weights import Head, stored_name, table
from opt_torch.weights import tensors
from tests.cases import Arrays
from tests.wings import Wing


class TorchWing(Wing):
    """opt_torch on the CPU."""

    name = "torch"
    fused = "flash_attention_2"

    def __init__(self) -> None:
        self.limit_threads()

    def limit_threads(self) -> None:
        torch.set_num_threads(1)

    def model_class(self, head: Head) -> Any:
        return getattr(opt_torch, f"OPT{head.value}")

    def fresh(self, head: Head, config: OPTConfig, **options: Any) -> Any:
        return self.model_class(head)(config, **options).eval()

    def build(
        self, head: Head, config: OPTConfig, weights: Arrays, dtype: str = "float32", **options: Any
    ) -> Any:
        model = self.fresh(head, config, **options).to(getattr(torch, dtype))
        state = {stored_name(n, head): torch.tensor(v) for n, v in weights.items()}
        model.load_state_dict(state)
        return model

    def weights(self, model: Any) -> Arrays:
        stored = tensors(model, model.config, model.head)
        names = table(model.config, model.head)
        # A copy, since tensors share the memory of the model.
        return {name: stored[stored_name(name, model.head)].read().copy() for name in names}

    def call(self, model: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            return self.numpy(model(**self._tensors(inputs)))

    def modules(self, model: Any, **inputs: Any) -> Arrays:
        outputs: Arrays = {}
        prefix = "model" if model.head is Head.NONE else ""
        hooks = []
        for path, module in model.named_modules():
            whole = ".".join(part for part in (prefix, path) if part)
            if not whole:
                continue

            def note(_module: Any, _inputs: Any, output: Any, whole: str = whole) -> None:
                first = output if isinstance(output, torch.Tensor) else output[0]
                outputs[whole] = self.numpy(first)

            hooks.append(module.register_forward_hook(note))
        result = self.call(model, **inputs)
        for hook in hooks:
            hook.remove()
        if prefix:
            outputs[prefix] = result.last_hidden_state
        return outputs

    def gradients(self, model: Any, **inputs: Any) -> Arrays:
        model.zero_grad()
        model(**self._tensors(inputs)).loss.backward()
        return {
            name: self.numpy(model.get_parameter(stored_name(name, model.head)).grad)
            for name in table(model.config, model.head)
        }

    def array(self, values: Any) -> Any:
        return torch.from_numpy(np.array(values))

    def numpy(self, values: Any) -> Any:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            half = values.dtype in (torch.float16, torch.bfloat16)
            return (values.float() if half else values).numpy()
        if isinstance(values, dict):
            return type(values)((name, self.numpy(value)) for name, value in values.items())
        if type(values) is tuple:
            return tuple(self.numpy(value) for value in values)
        return values

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {n: v for n, v in inputs.items() if isinstance(v, np.ndarray)}
        return {**inputs, **{name: self.array(value) for name, value in arrays.items()}}
