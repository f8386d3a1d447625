"""What the OPT classes share: building, loading, saving, resizing, pruning, checkpointing."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from opt_core.checkpoint import TensorSource
from opt_core.config import DTYPES, OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.pretrained import SavingMixin
from opt_core.surgery import vocabulary_size
from opt_core.weights import Head, table
from opt_torch import weights
from opt_torch.attention import IMPLEMENTATIONS
from opt_torch.decoder import Decoder
from opt_torch.models import surgery


class OPTPreTrainedModel(SavingMixin, nn.Module):
    """The part of every OPT class that is not its forward pass.

    A model holds its own copy of the configuration; fields that decide names and shapes of weights
    cannot change in it. `resize_token_embeddings` and `prune_heads` give the model a new one.
    """

    head: ClassVar[Head]
    config_class = OPTConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["OPTDecoderLayer"]
    _tied_weights_keys: Mapping[str, str] = MappingProxyType({})
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None

    config: OPTConfig
    generation_config: GenerationConfig

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__()
        # A locked one is another model's, which keeps it for itself.
        self.config = copy.deepcopy(config).locked()
        self.name_or_path = config.name_or_path
        self.generation_config = GenerationConfig.from_model_config(config)
        if attn_implementation is None:
            attn_implementation = getattr(config, "_attn_implementation", None)
        self.set_attn_implementation("sdpa" if attn_implementation is None else attn_implementation)

    def _finish(self) -> None:
        """Share the configuration with the parts, tie what is tied, draw the rest afresh."""
        self._adopt(self.config)
        self.tie_weights()
        rows = table(self.config, self.head)
        inner = set(table(self.config, Head.NONE)) if self.head is not Head.NONE else set()
        weights.fresh(self, (rows[name] for name in rows if name not in inner), self.head)

    def _adopt(self, config: OPTConfig) -> None:
        self.config = config
        for module in self.modules():
            if isinstance(getattr(module, "config", None), OPTConfig):
                module.config = config  # type: ignore[assignment]

    @property
    def _decoder(self) -> Decoder:
        decoder = self.base_model.get_submodule("decoder")
        assert isinstance(decoder, Decoder)
        return decoder

    @property
    def base_model(self) -> nn.Module:
        """The `OPTModel` inside, or this model if it is one."""
        return self if self.head is Head.NONE else self.get_submodule(self.base_model_prefix)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first parameter of floating type."""
        return next(p.dtype for p in self.parameters() if p.dtype.is_floating_point)

    @property
    def attn_implementation(self) -> str:
        """How queries meet keys: "eager", "sdpa" or "flash_attention_2"."""
        name: str = self.config._attn_implementation
        return name

    def set_attn_implementation(self, name: str) -> None:
        """Choose another attention implementation.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"there is no attention implementation {name!r}; there are "
                f"{', '.join(IMPLEMENTATIONS)}"
            )
        self.config._attn_implementation = name

    # --- files -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        config: OPTConfig | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        check: bool = True,
        **options: Any,
    ) -> Self:
        """Load a checkpoint: a folder, a file, an index, or a repository of the hub.

        The model computes in float32 unless `dtype` (or `torch_dtype`) names another type, or is
        "auto": the type of the file. Weights of that type stay in the file, mapped copy-on-write.
        `device_map` is handed to accelerate. `check=False` leaves out the search for NaN. Further
        options are those of the hub (`revision`, `token`, `cache_dir`, `local_files_only`,
        `force_download`, `subfolder`), the hints `from_pt`, `from_tf` and `from_flax` (which
        files to look for first), and fields of the configuration. The model comes back in
        evaluation mode.

        Raises:
            CheckpointNotFound: there is no checkpoint, or a file of it is missing.
            CheckpointMismatch: its tensors are not those that the configuration asks for.
            CheckpointDamaged: a file cannot be read as what it claims to be.
            CheckpointUnsafe: a file asks for something that no checkpoint may.
            HubError: the repository cannot be read.
            ValueError: a bad configuration or argument.
        """
        wanted = dtype if dtype is not None else torch_dtype
        opened = weights.open_pretrained(source, config=config, options=options)
        with torch.device("meta"):
            model = cls(opened.config, attn_implementation=attn_implementation)
        weights.load(
            model,
            model.config,
            cls.head,
            opened.checkpoint,
            dtype=None if wanted == "auto" else _dtype(wanted),
            device=torch.get_default_device() if device is None else torch.device(device),
            check=check,
        )
        model.tie_weights()
        model.config.dtype = _name(model.dtype)
        model.generation_config = opened.generation_config
        model.eval()
        return model if device_map is None else _dispatch(model, device_map)

    def _stored_tensors(self) -> Mapping[str, TensorSource]:
        return weights.tensors(self, self.config, self.head)

    def _stored_dtype(self) -> str:
        return _name(self.dtype)

    # --- embeddings and heads ----------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding; a tied head follows."""
        self._decoder.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, or None for a class without one."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the language-model head.

        Raises:
            ValueError: this class has none.
        """
        if self.head is not Head.CAUSAL_LM:
            raise ValueError(f"{type(self).__name__} has no output embeddings to set")
        self.lm_head = value

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Make the head's weight the embedding's, where the configuration ties them."""
        output = self.get_output_embeddings()
        if output is not None and self.config.tie_word_embeddings:
            output.weight = self.get_input_embeddings().weight

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the size of the vocabulary, keeping the rows that stay and the tie.

        New rows are drawn as fresh ones are. Returns the embedding; unchanged if no size is given.

        Raises:
            ValueError: a size below 1, or one that leaves a special token outside.
        """
        size = vocabulary_size(self.config, new_num_tokens, pad_to_multiple_of)
        if size != self.config.vocab_size:
            surgery.resize(self, size)
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove attention heads for good: `{layer: heads}`, numbered as in the whole model.

        Raises:
            ValueError: there is no such layer or head, or a layer would keep none.
        """
        surgery.prune(self, heads_to_prune)

    # --- training ----------------------------------------------------------------------------

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self._decoder.checkpoint_every > 0

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Trade time for memory in training: activations of layers are computed again going back.

        Raises:
            ValueError: offloading, or an option other than `use_reentrant=False`.
        """
        given = dict(activation_checkpointing_kwargs or {})
        given.pop("use_reentrant", None)
        if offload or given:
            asked = ", ".join([*given, *(["offload"] if offload else [])])
            raise ValueError(f"gradient checkpointing has no option {asked}")
        self._decoder.checkpoint_every = every_n_layers

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The earlier name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._decoder.checkpoint_every = 0

    def enable_input_require_grads(self) -> None:
        """Let gradients reach adapters through a frozen embedding."""

        def require_grad(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        self.get_input_embeddings().register_forward_hook(require_grad)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters; a tied one counts once."""
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(p) in embeddings)
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(value: torch.dtype | str | None) -> torch.dtype:
    name = "float32" if value is None else str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {value!r}; it must be auto or one of {', '.join(DTYPES)}")
    kind: torch.dtype = getattr(torch, name)
    return kind


def _dispatch(model: Any, device_map: str | Mapping[str, Any]) -> Any:
    """Spread a loaded model over devices through accelerate."""
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as fault:
        raise ImportError("device_map needs accelerate: pip install accelerate") from fault
    if not isinstance(device_map, str):
        places = dict(device_map)
    elif device_map in ("auto", "balanced", "sequential"):
        whole = model._no_split_modules
        memory = None
        if device_map != "sequential":
            memory = get_balanced_memory(model, no_split_module_classes=whole)
        places = infer_auto_device_map(model, memory, no_split_module_classes=whole)
    else:
        places = {"": device_map}
    return dispatch_model(model, device_map=places)
