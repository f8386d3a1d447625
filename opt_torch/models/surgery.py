"""Changes of a built model's shape: another vocabulary, fewer heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opt_core.surgery import pruned, resized
from opt_torch.decoder import SelfAttention
from opt_torch.weights import check_whole

if TYPE_CHECKING:
    from opt_torch.models.base import OPTPreTrainedModel


def resize(model: OPTPreTrainedModel, size: int) -> None:
    """Give the embedding, and an untied head, `size` rows."""
    check_whole(model, "resizing the vocabulary")
    old = model.config
    config = resized(old, size, stacklevel=3).locked()
    config._attn_implementation = model.attn_implementation
    embedding = model.get_input_embeddings()
    embedding.weight = _resized(embedding.weight, size, old.init_std)
    embedding.num_embeddings = size
    head = model.get_output_embeddings()
    if head is not None:
        if not old.tie_word_embeddings:
            head.weight = _resized(head.weight, size, old.init_std)
        head.out_features = size
    model._adopt(config)
    model.tie_weights()


def prune(model: OPTPreTrainedModel, heads: Mapping[int, Iterable[int]]) -> None:
    """Cut the rows of q, k and v, and the columns of the output projection, of the named heads."""
    check_whole(model, "pruning heads")
    head_dim = model.config.head_dim
    config, keeps = pruned(model.config, heads)
    config = config.locked()
    config._attn_implementation = model.attn_implementation
    for layer, keep in keeps.items():
        attention = model._decoder.layers[layer].get_submodule("self_attn")
        assert isinstance(attention, SelfAttention)
        for name in ("q_proj", "k_proj", "v_proj"):
            _keep_heads(getattr(attention, name), keep, head_dim, axis=0)
        _keep_heads(attention.out_proj, keep, head_dim, axis=1)
    model._adopt(config)


def _resized(weight: Tensor, size: int, std: float) -> nn.Parameter:
    rows = weight.new_empty(size, weight.shape[1])
    same = min(size, weight.shape[0])
    with torch.no_grad():
        rows[:same] = weight[:same]
        rows[same:].normal_(0, std)
    return nn.Parameter(rows, requires_grad=weight.requires_grad)


def _keep_heads(linear: nn.Linear, keep: list[int], width: int, *, axis: int) -> None:
    places = torch.tensor([head * width + i for head in keep for i in range(width)])
    places = places.to(linear.weight.device)
    weight = linear.weight.detach().index_select(axis, places)
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if axis == 0:
        linear.out_features = len(places)
        if linear.bias is not None:
            bias = linear.bias.detach()[places]
            linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    else:
        linear.in_features = len(places)
