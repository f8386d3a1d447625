"""Files of Keras 3: `.weights.h5`, and `.keras`, a zip archive of such weights and a description.

Keras names layers by class and number (`decoder_layer_1`) and weights by number (`vars/0`). What a
layer of general use is for, such as a head, stands in the attribute `name` beside its weights.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from conversion.keras_file.structure import HDF5_START, read_structure
from conversion.keras_file.tf import stored_file
from conversion.keras_file.writing import Layout, hdf5_file
from conversion.names import FrameworkRule
from conversion.pieces import Count, Piece, Tensors, single
from conversion.zip_file import ZIP_START, entry_offset, read_entries
from conversion.zip_writing import Archive
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    StoredFile,
    StoredTensor,
)
from opt_core.checkpoint.reading import parse_json
from opt_core.config import OPTConfig
from opt_core.weights import Head

WEIGHTS = "model.weights.h5"
_BODY = "layers/tfopt_model/"  # where a model with a head keeps the decoder's model
_LAYER = re.compile(r"/layers/decoder_layer(?:_(\d+))?/")
_HEAD = re.compile(r"layers/dense(?:_\d+)?(/vars/\d+)")
_HEADS = ("lm_head", "score", "qa_outputs")
_VERSION = "3.12.0"  # the oldest Keras that our models run with
# The number of a weight in its layer; a layer has at most one of each row.
_NUMBERS = {"kernel": 0, "gamma": 0, "embeddings": 0, "bias": 1, "beta": 1}


def is_keras(path: Path, start: bytes) -> bool:
    """Whether a file is one of Keras 3's: by its name, else by the numbers of its weights."""
    if path.name.endswith(".weights.json"):
        return True
    if start.startswith(ZIP_START):
        return path.suffix == ".keras"
    if not start.startswith(HDF5_START):
        return False
    if path.name.endswith(".weights.h5"):
        return True
    try:
        return any("/vars/" in name for name in read_structure(stored_file(path)).datasets)
    except CheckpointError:
        return False


def read_keras(path: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """The tensors of a file, an archive or shards, and the files that they lie in."""
    if path.name.endswith(".json"):
        return _read_shards(path)
    file = stored_file(path)
    with file.open() as handle:
        archived = handle.read(len(ZIP_START)) == ZIP_START
    start, size = _place_in_archive(file) if archived else (0, file.size)
    return _read(file, start, size), (path,)


def _read(file: StoredFile, start: int, size: int) -> dict[str, StoredTensor]:
    structure = read_structure(file, start, size)
    tensors: dict[str, StoredTensor] = {}
    for path, tensor in structure.datasets.items():
        group = structure.attributes.get(path.rpartition("/")[0], {})
        own = structure.attributes.get(path, {})
        if own.get("dtype") == "bfloat16" and tensor.dtype == np.dtype("V2"):
            tensor = replace(tensor, dtype=np.dtype(ml_dtypes.bfloat16))
        head = _HEAD.fullmatch(path)
        name = f"layers/{group['name']}{head[1]}" if head and group.get("name") in _HEADS else path
        if name in tensors:
            raise CheckpointDamaged(f"{file.path} holds the weight {name!r} twice")
        tensors[name] = tensor
    return tensors


def _read_shards(index: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """The shards that Keras's own index names, which may spread one layer over several."""
    file = stored_file(index)
    with file.open() as handle:
        shards = parse_json(index, handle.readall(), "it").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointDamaged(f"{index} has no weight_map, which says where each layer is")
    tensors: dict[str, StoredTensor] = {}
    files = [index]
    for names in shards.values():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
                raise CheckpointUnsafe(
                    f"{index} names the shard {name!r}; a shard is a file in the checkpoint's own "
                    "folder. Nothing outside it was opened"
                )
            if (shard := index.parent / name) in files:
                continue
            files.append(shard)
            if not os.path.isfile(shard):
                raise CheckpointNotFound(f"{index.parent} lacks the shard {name} of {index.name}")
            file = stored_file(shard)
            found = _read(file, 0, file.size)
            if twice := tensors.keys() & found.keys():
                raise CheckpointDamaged(f"{index}: two shards hold {min(twice)!r}")
            tensors |= found
    return tensors, tuple(files)


def _place_in_archive(file: StoredFile) -> tuple[int, int]:
    """Where in a `.keras` file the weights begin, and how many bytes they have."""
    with file.open() as raw:
        handle = io.BufferedReader(raw)
        entry = read_entries(file, handle).get(WEIGHTS)
        if entry is None:
            raise CheckpointDamaged(f"{file.path} is no model of Keras: it holds no {WEIGHTS}")
        return entry_offset(file, handle, entry), entry.file_size


def _path(name: str) -> str | None:
    """The dotted path of a parameter; states of optimizers and of dropout are no weights."""
    if name.startswith("optimizer/") or name.endswith("/vars/seed"):
        return None
    module, _, number = name.rpartition("/vars/")
    module = _LAYER.sub(lambda found: f"/layers/{found[1] or 0}/", module)
    if module.startswith(_BODY):
        module = "model/" + module.removeprefix(_BODY)
    module = module.removeprefix("layers/")
    last = module.rpartition("/")[2]
    if last.startswith("embed_"):
        leaves = ["embeddings"]
    elif last.endswith("layer_norm"):
        leaves = ["gamma", "beta"]
    else:
        leaves = ["kernel", "bias"]
    numbered = dict(zip("01", leaves, strict=False))
    return f"{module}/{numbered[number]}".replace("/", ".") if number in numbered else name


def _spelled(path: str, head: Head) -> str:
    module, _, leaf = path.replace(".", "/").rpartition("/")
    if module.startswith("model/"):
        module = module.removeprefix("model/")
        module = module if head is Head.NONE else _BODY + module
    else:
        module = f"layers/{module}"

    def layer(found: re.Match[str]) -> str:
        return "/layers/decoder_layer" + ("" if found[1] == "0" else f"_{found[1]}") + "/"

    module = re.sub(r"(?<=decoder)/layers/(\d+)/", layer, module)
    return f"{module}/vars/{_NUMBERS.get(leaf, leaf)}"


#: The names and the layout of Keras 3's files of our models.
KERAS = FrameworkRule("keras", _spelled, _path)


def keras_pieces(tensors: Tensors, config: OPTConfig, head: Head) -> list[Piece]:
    """One file `model.keras`, the whole model; Keras loads weights alone from it too."""

    def write(path: Path, tensors: Tensors, count: Count) -> None:
        with path.open("xb") as handle:
            _write(handle, tensors, count, config, head)

    return single("model.keras", tensors, write)


def _write(handle: BinaryIO, tensors: Tensors, count: Count, config: OPTConfig, head: Head) -> None:
    metadata = json.dumps({"keras_version": _VERSION}).encode()
    described = json.dumps(_description(tensors, config, head)).encode()
    with Archive(handle) as archive:
        archive.add("metadata.json", len(metadata), [metadata])
        archive.add("config.json", len(described), [described])
        archive.add(WEIGHTS, *hdf5_file(_layout(tensors), count))


def _layout(tensors: Tensors) -> Layout:
    """The weights as Keras lays them out, each layer with its name."""
    placed = {}
    attributes: dict[str, Mapping[str, str | list[str]]] = {}
    for name, tensor in tensors.items():
        path, group = name, name.rpartition("/")[0]
        layer = group.removesuffix("/vars").rpartition("/")[2]
        if layer in _HEADS:
            group = "layers/dense/vars"
            path = f"{group}/{name.rpartition('/')[2]}"
        placed[path] = tensor
        attributes[group] = {"name": layer}
        if tensor.dtype == np.dtype(ml_dtypes.bfloat16):
            attributes[path] = {"dtype": "bfloat16"}
    return Layout(placed, attributes, opaque=True)


def _description(tensors: Tensors, config: OPTConfig, head: Head) -> dict[str, Any]:
    """What Keras makes the model of, which needs `import opt_tf` for its class."""
    name = f"TFOPT{head.value}"
    widest = reduce(np.promote_types, {tensor.dtype for tensor in tensors.values()})
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": widest.name}}
    return {
        "module": "opt_tf.models.opt",
        "class_name": name,
        "config": {
            "config": config.to_dict(),
            "dtype": {**policy, "registered_name": None},
            "trainable": True,
        },
        "registered_name": f"optlm>{name}",
        "build_config": {"shapes_dict": {}},
        "compile_config": {},
    }
