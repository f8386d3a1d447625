"""The configuration of an OPT model: validated fields, derived facts, its JSON form."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from opt_core.config import forms
from opt_core.config.files import CONFIG_FILE, config_path, read_json
from opt_core.config.presets import PRESETS
from opt_core.config.rules import METADATA, RULES, check_together


class OPTConfig:
    """Everything that decides what an OPT model computes; validated when built and on assignment.

    Field names are those of Hugging Face's `config.json`. `word_embed_proj_dim` None means
    `hidden_size`. `dtype` (also accepted and read as `torch_dtype`) names the type of the stored
    weights.

    Raises:
        ValueError: a field holds what it may not (naming field, value and remedy), two fields do
            not fit each other, or an argument is unknown (naming the nearest known one).
    """

    model_type = "opt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    #: OPT's position table starts with two rows that no position reads (fairseq's padding offset).
    position_offset = 2
    #: PyTorch's default, which metaseq's layer norms never change.
    layer_norm_eps = 1e-5

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    max_position_embeddings: int
    do_layer_norm_before: bool
    _remove_final_layer_norm: bool
    word_embed_proj_dim: int
    dropout: float
    attention_dropout: float
    num_attention_heads: int
    activation_function: str
    layerdrop: float
    init_std: float
    use_cache: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    tie_word_embeddings: bool
    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None
    pruned_heads: dict[int, list[int]]
    output_attentions: bool
    output_hidden_states: bool
    return_dict: bool
    dtype: str | None
    name_or_path: str
    architectures: list[str] | None

    def __init__(
        self,
        vocab_size: int = 50272,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        ffn_dim: int = 3072,
        max_position_embeddings: int = 2048,
        do_layer_norm_before: bool = True,
        _remove_final_layer_norm: bool = False,
        word_embed_proj_dim: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        num_attention_heads: int = 12,
        activation_function: str = "relu",
        layerdrop: float = 0.0,
        init_std: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 2,
        eos_token_id: int | list[int] | None = 2,
        enable_bias: bool = True,
        layer_norm_elementwise_affine: bool = True,
        *,
        tie_word_embeddings: bool = True,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        pruned_heads: Mapping[int, Iterable[int]] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        dtype: Any = None,
        torch_dtype: Any = None,
        name_or_path: str = "",
        architectures: list[str] | None = None,
        transformers_version: str | None = None,
        tokenizer_class: str | None = None,
        finetuning_task: str | None = None,
        task_specific_params: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k in RULES or k in METADATA}
        _refuse_unknown(unknown, "OPTConfig has no argument")
        if word_embed_proj_dim is None:
            del given["word_embed_proj_dim"]
        given["dtype"] = dtype if dtype is not None else torch_dtype
        given["pruned_heads"] = pruned_heads or {}
        given["id2label"], given["label2id"] = forms.labels(num_labels, id2label, label2id)
        state = self.__dict__
        state.update(_locked=False, _complete=False, _extra={})
        faults = []
        for name, value in given.items():
            try:
                setattr(self, name, value)
            except ValueError as fault:
                faults.append(str(fault))
        if faults:
            raise ValueError("\n".join(faults))
        if word_embed_proj_dim is None:
            self.word_embed_proj_dim = hidden_size
        check_together(self)
        state["_complete"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dtype":
            value = forms.dtype_name(value)
        elif name == "pruned_heads":
            value = forms.heads(value)
        elif isinstance(value, list):
            value = list(value)
        rule = RULES.get(name)
        if rule is None:
            self._set_unruled(name, value)
            return
        if not rule.holds(value):
            raise ValueError(f"OPTConfig.{name} is {value!r}; it must be {rule.words}")
        if rule.fixed and self._locked and rule.fixed(value) != rule.fixed(getattr(self, name)):
            raise ValueError(
                f"OPTConfig.{name} cannot change from {getattr(self, name)!r} to {value!r}: "
                "the model is built and its weights depend on it; build a new model, or use "
                "resize_token_embeddings or prune_heads"
            )
        before = self.__dict__.get(name)
        self.__dict__[name] = value
        if self._complete:
            try:
                check_together(self)
            except ValueError:
                self.__dict__[name] = before
                raise

    def _set_unruled(self, name: str, value: Any) -> None:
        """Derived fields, what other libraries note on a configuration, and names nobody knows."""
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        elif name in METADATA or name.startswith("_"):
            self.__dict__[name] = value
        elif name in self._extra:
            self._extra[name] = value
        else:
            _refuse_unknown({name: value}, "OPTConfig has no field")

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("_extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"OPTConfig has no field {name!r}{_nearest(name)}")

    @property
    def torch_dtype(self) -> str | None:
        """The same as `dtype`, under the name that earlier files use."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def num_labels(self) -> int:
        """How many classes the classification head tells apart."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label, self.label2id = forms.labels(count, None, None)

    @property
    def use_return_dict(self) -> bool:
        """The older name of `return_dict`."""
        return self.return_dict

    @property
    def has_final_layer_norm(self) -> bool:
        """Post-norm models have none; pre-norm ones unless an early checkpoint left it out."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def has_projections(self) -> bool:
        """Whether embeddings pass through `project_in` and `project_out`, as in OPT-350M."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def heads(self, layer: int) -> int:
        """The number of attention heads that a layer has left after pruning."""
        return self.num_attention_heads - len(self.pruned_heads.get(layer, ()))

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> OPTConfig:
        """This configuration: a text model has no other part (PEFT and the Trainer ask)."""
        return self

    def locked(self) -> OPTConfig:
        """An own copy for a model to hold, whose weight-shaping fields stay as they are."""
        if self._locked:
            return self
        own = copy.deepcopy(self)
        own.__dict__["_locked"] = True
        return own

    def replace(self, **changes: Any) -> OPTConfig:
        """A new, validated, unlocked configuration that differs in the named fields.

        Raises:
            ValueError: a bad value, or a field that is not there (naming the nearest one).
        """
        unknown = changes.keys() - {*_KNOWN, *self._extra}
        _refuse_unknown({name: None for name in sorted(unknown)}, "OPTConfig has no field")
        values = {**self.to_dict(), "name_or_path": self.name_or_path}
        if "hidden_size" in changes and not self.has_projections:
            del values["word_embed_proj_dim"]
        # Fields that are several names of one thing: what is not given follows what is.
        for same in (("dtype", "torch_dtype"), ("num_labels", "id2label", "label2id")):
            if not changes.keys().isdisjoint(same):
                values = {name: value for name, value in values.items() if name not in same}
        return type(self).from_dict({**values, **changes})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> OPTConfig:
        """The configuration of a published size, such as "125m", with fields changed at will.

        Raises:
            ValueError: no such size; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OPTConfig:
        """From what a `config.json` holds; keys that OPT does not know are kept and written back.

        Raises:
            ValueError: a bad field, or a `model_type` that is not "opt".
        """
        kind = values.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is no OPT configuration: model_type is {kind!r}, expected {cls.model_type!r}"
            )
        known_values = {k: v for k, v in values.items() if k in _KNOWN}
        config = cls(**known_values)
        extra = {k: v for k, v in values.items() if k not in (*_KNOWN, "model_type")}
        config.__dict__["_extra"] = extra
        return config

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> OPTConfig:
        """From one JSON file.

        Raises:
            ValueError: the file is no JSON object in UTF-8, or holds a bad field; names the file.
        """
        values = read_json(Path(path))
        try:
            return cls.from_dict(values)
        except ValueError as fault:
            raise ValueError(f"{path}: {fault}") from fault

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        **changes: Any,
    ) -> OPTConfig:
        """From a folder, a `config.json` or a repository of the hub, with fields changed at will.

        Raises:
            CheckpointNotFound: the folder has no `config.json`.
            ValueError: the file or a field is bad; names the file.
            HubError: the repository cannot be read.
        """
        from opt_core import hub

        folder = hub.resolve(
            source,
            files=[CONFIG_FILE],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        config = cls.from_json_file(config_path(folder))
        config = config.replace(**changes) if changes else config
        config.name_or_path = os.fspath(source)
        return config

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` into a folder, which is made if it is not there."""
        from opt_core.checkpoint import write_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        write_file(Path(folder) / CONFIG_FILE, self.to_json_string().encode())

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON can hold them; `from_dict` makes an equal configuration of them."""
        values = dict(self._extra)
        values.update((k, copy.deepcopy(self.__dict__[k])) for k in (*RULES, *METADATA))
        values["torch_dtype"] = values.pop("dtype")
        values["model_type"] = self.model_type
        del values["name_or_path"]
        optional = (*METADATA, "torch_dtype", "problem_type", "pruned_heads")
        return {k: v for k, v in values.items() if v not in (None, {}) or k not in optional}

    def to_json_string(self) -> str:
        """What `config.json` holds: sorted keys, ends with a line break."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OPTConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"OPTConfig {self.to_json_string()}"


#: Every name that the constructor takes.
_KNOWN = (*RULES, *METADATA, "num_labels", "torch_dtype")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _refuse_unknown(unknown: Mapping[str, Any], what: str) -> None:
    if unknown:
        raise ValueError("; ".join(f"{what} {name!r}{_nearest(name)}" for name in unknown))
