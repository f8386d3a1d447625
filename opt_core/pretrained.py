"""What every model does with its files, whatever its framework: saving, and going to the hub."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from opt_core import hub
from opt_core.checkpoint import TensorSource, save
from opt_core.config import CONFIG_FILE, OPTConfig
from opt_core.generation import GENERATION_FILE, GenerationConfig
from opt_core.weights import Head


class SavingMixin:
    """`save_pretrained` and `push_to_hub` for a model that can hand out its tensors."""

    head: ClassVar[Head]
    config: OPTConfig
    generation_config: GenerationConfig

    def _stored_tensors(self) -> Mapping[str, TensorSource]:
        """The tensors of a checkpoint by the names of the file, in the stored layout."""
        raise TypeError(f"{type(self).__name__} does not say what its files hold")

    def _stored_dtype(self) -> str:
        """The type that the configuration names for them."""
        raise TypeError(f"{type(self).__name__} does not say what its files hold")

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        **hub_options: Any,
    ) -> None:
        """Write `config.json`, `generation_config.json` and safetensors that transformers opens.

        A tied head is stored once, as the embedding. A save that is killed leaves the old files
        as they were. With `push_to_hub` the folder is uploaded too (`repo_id`, `token`, …: see
        `push_to_hub`; `repo_id` is the folder's name if not given).

        Raises:
            ValueError: a bad shard size, an unknown option, options of generation that contradict
                each other, or a parameter is not there (an adapter took its place).
        """
        if hub_options and not push_to_hub:
            raise ValueError(
                f"save_pretrained has no option {', '.join(hub_options)} unless push_to_hub=True; "
                "what it writes is always safetensors"
            )
        self.generation_config.validate()
        tensors, name = self._stored_tensors(), f"OPT{self.head.value}"
        config = self.config.replace(architectures=[name], dtype=self._stored_dtype())
        if config.pruned_heads:
            warnings.warn(
                "the model has pruned heads: only optlm loads the saved files", stacklevel=2
            )
        save(
            Path(folder),
            tensors,
            max_shard_size=max_shard_size,
            extra_files={
                CONFIG_FILE: config.to_json_string().encode(),
                GENERATION_FILE: self.generation_config.to_json_string().encode(),
            },
        )
        if push_to_hub:
            hub.push(folder, hub_options.pop("repo_id", Path(folder).name), **hub_options)

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "5GB", **options: Any
    ) -> str:
        """Save and upload; returns the address of the commit.

        Options are those of `opt_core.hub.push`: `private`, `token`, `revision`, `commit_message`,
        `create_pr`.

        Raises:
            HubError: the hub refused, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return hub.push(folder, repo_id, **options)
