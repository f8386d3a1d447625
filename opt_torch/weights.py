"""Weights of a model: loaded from a checkpoint, fresh by the table's distribution, handed out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from conversion import WEIGHT_FILES, open_checkpoint
from opt_core import hub
from opt_core.checkpoint import Checkpoint, TensorSource, has_nan
from opt_core.config import CONFIG_FILE, OPTConfig
from opt_core.generation import GENERATION_FILE
from opt_core.weights import CheckpointWarning, Head, Weight, fit, stored_name, table

#: What a user may say about where a checkpoint is fetched from; see `opt_core.hub.resolve`.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def locate(source: str | os.PathLike[str], hub_options: Mapping[str, Any]) -> Path:
    """The local folder (or file) that holds a checkpoint and its configuration.

    Raises:
        HubError: the repository cannot be read.
    """
    return hub.resolve(
        source,
        files=[CONFIG_FILE],
        optional=[GENERATION_FILE],
        one_of=WEIGHT_FILES,
        **hub_options,
    )


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
    rows = table(config, head)
    matched = fit(config, head, checkpoint.tensors, source=str(checkpoint.path))
    spoiled = []
    for name, source in sorted(matched.sources.items(), key=lambda item: -rows[item[0]].size):
        values = source.map()
        if check and has_nan(values):
            spoiled.append(name)
        _set(model, stored_name(name, head), as_tensor(values).to(device, dtype))
    if spoiled:
        warnings.warn(
            f"{checkpoint.path}: there are NaN values in {', '.join(spoiled)}; what the model "
            "computes with them is NaN too",
            CheckpointWarning,
            stacklevel=3,
        )
    stored = stored_dtype(checkpoint)
    for name in matched.new:
        empty = torch.empty(rows[name].shape, dtype=dtype or stored, device=device)
        _set(model, stored_name(name, head), empty)
    fresh(model, (rows[name] for name in matched.new), head)


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
        ValueError: a parameter of the table is not in the model (an adapter took its place).
    """
    result: dict[str, TensorSource] = {}
    for name in (stored_name(name, head) for name in table(config, head)):
        try:
            result[name] = _Parameter(model.get_parameter(name).detach())
        except AttributeError as fault:
            raise ValueError(
                f"the model has no parameter {name}: something took the place of its module, such "
                "as an adapter; merge or unload adapters before saving the whole model"
            ) from fault
    return result


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


def open_pretrained(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that `locate` found, in whatever format it is."""
    return open_checkpoint(folder)
