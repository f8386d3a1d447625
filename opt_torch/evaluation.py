"""A model as in evaluation, beside one that trains."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn


def evaluating(model: Any) -> Any:
    """The model as in evaluation: nothing of it is dropped by chance.

    Where a part of it trains this is a copy of the modules over the same weights, so that other
    threads, and the caller after an error, find all modes as they were.
    """
    if not any(module.training for module in model.modules()):
        return model
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            # Not by the class, which under FSDP makes another one.
            copy = copies[module] = object.__new__(type(module))
            own = {name: _bound(value, module, copy) for name, value in vars(module).items()}
            children = {n: m if m is None else copied(m) for n, m in module._modules.items()}
            vars(copy).update(own, training=False, _modules=children)
        return copies[module]

    return copied(model)


def _bound(value: Any, module: nn.Module, copy: nn.Module) -> Any:
    """What a module holds, for its copy: a `forward` that Accelerate has wrapped runs the copy."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, copy)
    if isinstance(value, partial) and value.args and value.args[0] is module:
        return partial(value.func, copy, *value.args[1:], **value.keywords)
    return value
