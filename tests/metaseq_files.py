"""Checkpoints as metaseq and fairscale leave them, made from weights under canonical names.

Written from what metaseq's merging tools (`metaseq/distributed/stitch_fsdp_ckpt.py`) and fairscale
(`FullyShardedDataParallel._get_shard`, `local_metadata_dict`) do, not from the code under test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

State = dict[str, Any]

HEAD = "decoder.output_projection.weight"

#: Split by rows and by columns between model-parallel parts; anything else is in every part.
BY_ROWS = re.compile(r"embed_tokens|output_projection|\.fc1\.|\.[kvq]_proj\.")
BY_COLUMNS = re.compile(r"\.fc2\.weight|\.out_proj\.weight")


def metaseq_state(weights: Mapping[str, Any]) -> State:
    """Weights under metaseq's names, as torch tensors."""
    state: State = {"decoder.version": torch.tensor([3.0])}
    for name, values in weights.items():
        name = name.removeprefix("model.")
        name = name.replace("lm_head.", "decoder.output_projection.")
        name = re.sub(r"^decoder\.final_layer_norm\.", "decoder.layer_norm.", name)
        name = re.sub(r"^decoder\.project_(in|out)\.", r"decoder.project_\1_dim.", name)
        state[name] = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    return state


def fused(state: State) -> State:
    """The same with one `qkv_proj` for three: K, then V, then Q."""
    found: State = {}
    for name, tensor in state.items():
        if ".k_proj." in name:
            three = [state[name.replace(".k_proj.", f".{letter}_proj.")] for letter in "kvq"]
            found[name.replace(".k_proj.", ".qkv_proj.")] = torch.cat(three)
        elif not re.search(r"\.[vq]_proj\.", name):
            found[name] = tensor
    return found


def parts_of(state: State, count: int) -> list[State]:
    """A state with separate projections as `count` model-parallel parts hold it."""

    def part(name: str, tensor: Any, number: int) -> Any:
        if BY_ROWS.search(name):
            return tensor.chunk(count, 0)[number].clone()
        return tensor.chunk(count, 1)[number].clone() if BY_COLUMNS.search(name) else tensor.clone()

    return [{name: part(name, t, number) for name, t in state.items()} for number in range(count)]


def shards_of(state: State, count: int, *, tied: bool = False) -> list[dict[str, Any]]:
    """What each of `count` workers saves: a flat run a module, with its metadata."""
    modules: dict[str, State] = {}
    for name, tensor in state.items():
        layer = re.match(r"(decoder\.layers\.[0-9]+)\.(.+)", name)
        if name != "decoder.version":
            path, rest = layer.groups() if layer else ("", name)
            modules.setdefault(path, {})[rest] = tensor
    shared = [("decoder.embed_tokens.weight", "decoder.output_projection.weight")] if tied else []
    saved = []
    for rank in range(count):
        model: State = {"decoder.version": state["decoder.version"]}
        metadata = []
        for path, tensors in modules.items():
            whole = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
            chunks = list(whole.chunk(count))
            chunks += [whole.new_empty(0)] * (count - len(chunks))
            padding = chunks[0].numel() - chunks[rank].numel()
            key = f"{path}.flat_param_0" if path else "flat_param_0"
            model[key] = torch.nn.functional.pad(chunks[rank].clone(), [0, padding], value=6e4)
            described = {
                "names": list(tensors),
                "shapes": [tensor.size() for tensor in tensors.values()],
                "numels": [tensor.numel() for tensor in tensors.values()],
                "padding": padding,
            }
            metadata.append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": described},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [] if path else shared,
                }
            )
        buffers = {"param_metadata": metadata, "buffer_names": ["decoder.version"]}
        saved.append({"model": model, "shard_metadata": buffers})
    return saved


def save(content: Mapping[str, Any], path: Path, **beside: Any) -> Path:
    """Saves a checkpoint with what metaseq keeps beside the tensors."""
    training = {"extra_state": {"train_iterator": {"epoch": 1}}, "optimizer_history": [{}]}
    torch.save({**content, **training, **beside}, path)
    return path


def save_parts(folder: Path, states: list[State], stem: str = "reshard", **beside: Any) -> Path:
    """Saves model-parallel parts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, state in enumerate(states):
        save({"model": state}, folder / f"{stem}-model_part-{number}.pt", **beside)
    return folder


def save_shards(
    folder: Path, parts: list[State], shards: int, stem: str = "checkpoint_1_7"
) -> Path:
    """Saves every part as flat shards; without a number of the part if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, state in enumerate(parts):
        part = f"-model_part-{number}" if len(parts) > 1 else ""
        for rank, content in enumerate(shards_of(state, shards)):
            save(content, folder / f"{stem}{part}-shard{rank}.pt")
    return folder
