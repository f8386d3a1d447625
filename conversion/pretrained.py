"""What `from_pretrained` of every wing opens: configuration, tensors and generation options."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from conversion.formats import open_checkpoint, weight_files
from conversion.metaseq import without_padding
from opt_core import hub
from opt_core.checkpoint import Checkpoint
from opt_core.config import CONFIG_FILE, OPTConfig
from opt_core.generation import GENERATION_FILE, GenerationConfig

#: What a user may say about where a checkpoint is fetched from; see `opt_core.hub.resolve`.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
#: What users of transformers say about the files, and which formats are then looked for first.
HINTS = {"from_pt": ("safetensors", "pytorch"), "from_tf": ("tf",), "from_flax": ("flax",)}


#: What comes along from beside the weights, if it is there: tokenizer and generation files.
COMPANIONS = (
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Pretrained(NamedTuple):
    """A checkpoint with all that a model needs to be built for it."""

    #: A copy that is the caller's own, its `name_or_path` the source.
    config: OPTConfig
    checkpoint: Checkpoint
    #: What lies beside the weights, else what the configuration implies.
    generation_config: GenerationConfig


def located(
    source: str | os.PathLike[str],
    *,
    companions: Sequence[str] = COMPANIONS,
    prefer: Collection[str] = (),
    before: Callable[[Mapping[str, int]], object] | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """The local folder or file of a checkpoint, fetched from the hub if it is a repository's name.

    Of a repository come its configuration, its weights in the first format that it has (`prefer`
    names formats to look for before others), and what it has of `companions`. `before` is told what
    will be downloaded, bytes by file. `options` are those of the hub (`HUB_OPTIONS`).

    Raises:
        HubError: there is no such path, or the repository cannot be read.
    """
    return hub.resolve(
        source,
        files=[CONFIG_FILE],
        optional=companions,
        one_of=weight_files(prefer),
        before=before,
        **options,
    )


def open_pretrained(
    source: str | os.PathLike[str],
    *,
    config: OPTConfig | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any],
) -> Pretrained:
    """Open a folder, a file, an index or a repository of the hub, in any format; reads no tensor.

    `config` replaces the configuration beside the weights. `options` are those of the hub
    (`HUB_OPTIONS`), hints (`HINTS`), and fields of the configuration to change.

    Raises:
        CheckpointNotFound: there is no checkpoint, or a file of it is missing.
        CheckpointDamaged, CheckpointUnsafe: a file cannot, or may not, be read.
        HubError: the repository cannot be read.
        ValueError: a bad configuration or an unknown option.
    """
    hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    fields = {k: v for k, v in options.items() if k not in (*HUB_OPTIONS, *HINTS)}
    prefer = [name for hint, names in HINTS.items() if options.get(hint) for name in names]
    folder = located(source, companions=[GENERATION_FILE], prefer=prefer, options=hub_options)
    if not isinstance(config, OPTConfig):
        config = OPTConfig.from_pretrained(folder if config is None else config)
    config = config.replace(**fields) if fields else copy.deepcopy(config)
    config.name_or_path = os.fspath(source)
    checkpoint = without_padding(open_checkpoint(folder, prefer=prefer), config)
    beside = folder if folder.is_dir() else folder.parent
    if (beside / GENERATION_FILE).is_file():
        generation = GenerationConfig.from_pretrained(beside)
    else:
        generation = GenerationConfig.from_model_config(config)
    return Pretrained(config, checkpoint, generation)
