"""Products with linear layers at inference on a CPU, through oneDNN where PyTorch is slower.

On AMD processors PyTorch hands float32 products to a library that runs at half speed there. The
operators of oneDNN inside PyTorch do not; they are private, so each use is guarded and falls back
to the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

_TYPES = (torch.float32, torch.bfloat16)


class Operators(NamedTuple):
    """The operators of oneDNN: repack a weight, multiply, multiply and add a residual."""

    pack: Callable[[Tensor], Tensor]
    product: Callable[..., Tensor]
    product_plus: Callable[..., Tensor]


@lru_cache(maxsize=1)
def operators() -> Operators | None:
    """The operators of oneDNN if this PyTorch has them and they give right answers, else None."""
    try:
        pointwise = torch.ops.mkldnn._linear_pointwise
        found = Operators(
            torch.ops.mkldnn._reorder_linear_weight, pointwise.default, pointwise.binary
        )
        with torch.no_grad():
            x, weight, bias = (torch.linspace(-1, 1, n) for n in (6, 24, 8))
            x, weight = x.view(2, 3), weight.view(8, 3)
            expected = F.linear(x, weight, bias)
            packed = found.pack(weight)
            got = (
                found.product(x, weight, bias, "none", [], ""),
                found.product(x, packed, bias, "none", [], ""),
                found.product_plus(x, expected, packed, bias, "add") - expected,
            )
    except (AttributeError, RuntimeError, TypeError):
        return None
    return found if all(torch.allclose(y, expected, atol=1e-5) for y in got) else None


@lru_cache(maxsize=1)
def default_is_slow() -> bool:
    """Whether float32 products are faster through oneDNN than by PyTorch's choice: on AMD."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


def suits(module: nn.Module) -> bool:
    """Whether a layer is plainly `nn.Linear` on a CPU: nothing replaced, wrapped or watched."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and module.weight.dtype in _TYPES
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def is_free() -> bool:
    """Whether this moment allows private operators.

    It does not while gradients of either direction, a function transform, tracing or autocast must
    see what is computed, nor where the user has switched oneDNN off.
    """
    return not (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
        or not torch.backends.mkldnn.enabled
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
    )


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`: `[..., in]` -> `[..., out]`, by whichever operator is faster here."""
    if is_free() and default_is_slow() and suits(module):
        assert isinstance(module, nn.Linear)
        found = operators()
        if found is not None and type(x) is Tensor and x.dtype == module.weight.dtype:
            return found.product(x, module.weight, module.bias, "none", [], "")
    result: Tensor = module(x)
    return result
