"""Weights of a model: loaded from a checkpoint, fresh, handed out, spread over processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from conversion import open_pretrained as open_pretrained
from opt_core.checkpoint import Checkpoint, TensorSource
from opt_core.config import OPTConfig
from opt_core.weights import OUT, Head, Weight, read, stored_name, table

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

    from opt_torch.models import OPTPreTrainedModel

Model = TypeVar("Model", bound="OPTPreTrainedModel")

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def load(
    model: nn.Module,
    config: OPTConfig,
    head: Head,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    check: bool,
) -> None:
    """Give a model built on the meta device its weights, largest first.

    Where type and device are those of the file, the parameter is the file's memory map itself
    (copy on write). `dtype` None keeps the stored type. With `check`, NaN in a weight warns.

    Raises:
        CheckpointMismatch: the tensors are not those that the configuration asks for.
    """
    stored, new = stored_dtype(checkpoint), []
    for row, values in read(config, head, checkpoint, check=check):
        if values is None:
            tensor = torch.empty(row.shape, dtype=dtype or stored, device=device)
            new.append(row)
        else:
            tensor = as_tensor(values).to(device, dtype)
        _set(model, stored_name(row.name, head), tensor)
    fresh(model, new, head)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of a checkpoint's tensors: of the first, in the order of the file."""
    kind = next(iter(checkpoint.tensors.values())).dtype
    return as_tensor(np.empty(0, kind)).dtype


def fresh(model: nn.Module, rows: Iterable[Weight], head: Head) -> None:
    """Fill parameters with fresh values of the table's distribution, from torch's generator.

    On the meta device there is nothing to fill.
    """
    with torch.no_grad():
        for row in rows:
            parameter = model.get_parameter(stored_name(row.name, head))
            if parameter.is_meta:
                continue
            if row.std:
                parameter.normal_(row.mean, row.std)
            else:
                parameter.fill_(row.mean)
            if row.zero_row is not None:
                parameter[row.zero_row] = 0


def tensors(model: nn.Module, config: OPTConfig, head: Head) -> dict[str, TensorSource]:
    """What a checkpoint of this model holds, by the names of the file; copied only when read.

    Raises:
        ValueError: a parameter of the table is not in the model (an adapter took its place), or is
            spread over processes.
    """
    return {
        name: _Parameter(parameter.detach())
        for name, parameter in _parameters(model, config, head, "saving the whole model").items()
    }


def _parameters(
    model: nn.Module, config: OPTConfig, head: Head, purpose: str
) -> dict[str, nn.Parameter]:
    """The parameters of the table by the names of the file: all there, each in one piece."""
    check_whole(model, purpose)
    # By name, not by attribute: an adapter's layer lends out the weight of the one inside it.
    present = dict(model.named_parameters())
    names = [stored_name(name, head) for name in table(config, head)]
    for name in names:
        if name not in present:
            raise ValueError(
                f"the model has no parameter {name}: something took the place of its module, such "
                f"as an adapter; merge or unload adapters before {purpose}"
            )
    return {name: present[name] for name in names}


def check_whole(model: nn.Module, purpose: str) -> None:
    """Refuse what can be done only while this process holds every parameter as it is.

    Raises:
        ValueError: a parameter is spread over processes.
    """
    for name, parameter in model.named_parameters():
        if _mesh_of(parameter) is not None:
            raise ValueError(
                f"{name} is spread over processes, and {purpose} wants whole weights: do it before "
                "spreading them, or gather them with torch.distributed.checkpoint.state_dict."
                "get_model_state_dict and load them into a new model"
            )


def shard(model: Model, mesh: DeviceMesh) -> Model:
    """Spread a model over the processes of a mesh; each computes a part of every layer.

    Heads, feed-forward units and the vocabulary are cut along the axes of the weight table; what
    the table leaves whole, every process holds. The values are those of the mesh's first process.
    The model changes in place and is called as before: by all processes, with the same arguments
    and, in training with dropout, the same state of their random generators. A cache holds the
    heads of its process; all other results are whole.

    Raises:
        ValueError: the mesh has several dimensions or does not divide the model, or a parameter is
            spread already or not there (an adapter took its place).
    """
    # Late: it takes ten times as long as the rest of this package.
    from torch.distributed.tensor.parallel import parallelize_module

    _parameters(model, model.config, model.head, "sharding it")
    _check_shares(model.config, mesh)
    for path, split in _splits(model).items():
        module = model.get_submodule(path)
        if split is None:
            _replicate(module, mesh)
        else:
            is_head = module is model.get_output_embeddings()
            parallelize_module(module, mesh, _style(module, split, is_head))
        # Each style registers parameters of its own, of the head or of the embedding as well.
        model.tie_weights()
    for layer in model.base_model.get_submodule("decoder.layers").children():
        _share_out_heads(layer.get_submodule("self_attn"), mesh)
    return model


def _check_shares(config: OPTConfig, mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions, expected 1; pass one of it, such as mesh['tp']"
        )
    layers: dict[int, list[str]] = {}
    for layer in range(config.num_hidden_layers):
        layers.setdefault(config.heads(layer), []).append(str(layer))
    parts = {f"{heads} heads in layers {', '.join(at)}": heads for heads, at in layers.items()}
    parts[f"ffn_dim {config.ffn_dim}"] = config.ffn_dim
    uneven = [part for part, count in parts.items() if count % mesh.size()]
    if uneven:
        raise ValueError(
            f"{mesh.size()} processes cannot share the model evenly: {'; '.join(uneven)}; choose a "
            "mesh whose size divides these"
        )


def _splits(model: OPTPreTrainedModel) -> dict[str, int | None]:
    """The axis along which each module with parameters is cut, by its path."""
    result: dict[str, int | None] = {}
    for name, row in table(model.config, model.head).items():
        # A module's matrix comes before its bias, and says how it is cut.
        result.setdefault(stored_name(name, model.head).rpartition(".")[0], row.split)
    if model.get_output_embeddings() is not None:
        result["lm_head"] = OUT  # a tied one has no row
    return result


def _style(module: nn.Module, split: int, is_head: bool) -> ParallelStyle:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if isinstance(module, nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate())
    if split != OUT:
        return RowwiseParallel()
    return ColwiseParallel(output_layouts=Replicate() if is_head else None)


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Hold a module whole in every process, as distributed tensors, so that all are of a kind.

    Optimizers and the clipping of gradients do not mix these with plain ones.
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    def spread(_module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

    def local(_module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> Any:
        return output.to_local()

    distribute_module(module, mesh, None, spread, local)


def _share_out_heads(attention: nn.Module, mesh: DeviceMesh) -> None:
    """Give the attention of one process its part of the head factors; put weights together."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        *others, factors = inputs
        if factors is not None:
            factors = factors.to(mesh.device_type)
            factors = DTensor.from_local(factors, mesh, [Replicate()], run_check=False)
            factors = factors.redistribute(placements=[Shard(0)]).to_local()
        return (*others, factors)

    def after(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> Any:
        hidden, weights = output
        if weights is not None:
            weights = DTensor.from_local(weights, mesh, [Shard(1)], run_check=False).full_tensor()
        return hidden, weights

    attention.register_forward_pre_hook(before)
    attention.register_forward_hook(after)


def agreed(values: Tensor, parameter: Tensor) -> Tensor:
    """The first process's values, where those that share a parameter must compute with the same."""
    mesh = _mesh_of(parameter)
    if mesh is None:
        return values
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole: Tensor = distribute_tensor(values, mesh, [Replicate()]).to_local()
    return whole


def _mesh_of(parameter: Tensor) -> DeviceMesh | None:
    """The mesh of a distributed tensor; None for a plain one."""
    mesh: DeviceMesh | None = getattr(parameter, "device_mesh", None)
    return mesh


def as_tensor(values: NDArray[Any]) -> Tensor:
    """An array as a tensor that shares its memory; bfloat16 too."""
    if not values.flags.aligned:
        values = values.copy()
    if values.dtype == _BFLOAT16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array in C order, shared where it lies in the CPU's memory."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _set(model: nn.Module, path: str, values: Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent).register_parameter(leaf, nn.Parameter(values))


@dataclass(frozen=True)
class _Parameter:
    """A parameter as a source of values for saving; from an accelerator it is copied on reading."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return _as_array(torch.empty(0, dtype=self.tensor.dtype)).dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> NDArray[Any]:
        chosen = (
            self.tensor if part is None else self.tensor.movedim(axis, 0)[part].movedim(0, axis)
        )
        return _as_array(chosen)

    def map(self) -> NDArray[Any]:
        return _as_array(self.tensor)
