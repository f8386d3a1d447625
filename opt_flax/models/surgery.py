"""Changes of a built model: another vocabulary, fewer heads, parameters of another type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from opt_core.config import OPTConfig
from opt_core.surgery import pruned, resized, vocabulary_size
from opt_core.weights import EMBEDDING_NAME, LM_HEAD_NAME, table
from opt_flax.weights import Params, check_fit, path_of

if TYPE_CHECKING:
    from opt_flax.models.base import FlaxOPTPreTrainedModel


class ChangesMixin:
    """The part of every class that changes parameters, their shapes, or how training runs."""

    config: OPTConfig
    params: Params
    _module: Any

    def to_bf16(self: Any, params: Params, mask: Any = None) -> Params:
        """The parameters in bfloat16; those only for which a tree of bools says True."""
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self: Any, params: Params, mask: Any = None) -> Params:
        """The parameters in float16; those only for which a tree of bools says True."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self: Any, params: Params, mask: Any = None) -> Params:
        """The parameters in float32; those only for which a tree of bools says True."""
        return cast(params, jnp.float32, mask)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *,
        params: Params | None = None,
    ) -> Params:
        """Change the size of the vocabulary, keeping the rows that stay and the tie.

        New rows are drawn as fresh ones are. Returns the new parameters, of the model's own (which
        it then holds) or of those given. The same ones if no size is given.

        Raises:
            ValueError: a size below 1, or one that leaves a special token outside.
        """
        size = vocabulary_size(self.config, new_num_tokens, pad_to_multiple_of)
        changed = self.params if params is None else params
        if size != self.config.vocab_size:
            changed = resize(self, size, changed)  # type: ignore[arg-type]
        if params is None:
            self.params = changed
        return changed

    def prune_heads(
        self, heads_to_prune: Mapping[int, Iterable[int]], *, params: Params | None = None
    ) -> Params:
        """Remove attention heads for good: `{layer: heads}`, numbered as in the whole model.

        Returns the new parameters, of the model's own (which it then holds) or of those given.

        Raises:
            ValueError: there is no such layer or head, or a layer would keep none.
        """
        held = self.params if params is None else params
        changed = prune(self, heads_to_prune, held)  # type: ignore[arg-type]
        if params is None:
            self.params = changed
        return changed

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        every: int = self._module.checkpoint_every
        return every > 0

    def enable_gradient_checkpointing(self, every_n_layers: int = 1) -> None:
        """Trade time for memory in training: activations of layers are computed again going back.

        The model gets a new `module`, over the same parameters.
        """
        self._module = self._module.clone(checkpoint_every=every_n_layers)

    def gradient_checkpointing_enable(self, every_n_layers: int = 1) -> None:
        """The same, under the name that it has in the other wings."""
        self.enable_gradient_checkpointing(every_n_layers)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._module = self._module.clone(checkpoint_every=0)


def resize(model: FlaxOPTPreTrainedModel, size: int, params: Params) -> Params:
    """Parameters with `size` rows of the embedding, and of an untied head."""
    old = model.config
    check_fit(old, model.head, params)
    config = resized(old, size, stacklevel=3).locked()
    rows, leaves = table(old, model.head), flatten_dict(unfreeze(params))
    key = jax.random.fold_in(model.key, size)
    for axis, name in enumerate((EMBEDDING_NAME, LM_HEAD_NAME)):
        if name in rows:
            path = path_of(rows[name], model.head)
            own = jax.random.fold_in(key, axis)
            leaves[path] = _resized(leaves[path], size, axis, own, old.init_std)
    model._adopt(config)
    changed: Params = unflatten_dict(leaves)
    return changed


def prune(
    model: FlaxOPTPreTrainedModel, heads: Mapping[int, Iterable[int]], params: Params
) -> Params:
    """Parameters without the named heads' part of q, k, v and of the output projection."""
    old = model.config
    check_fit(old, model.head, params)
    config, keeps = pruned(old, heads)
    leaves = flatten_dict(unfreeze(params))
    for path, leaf in leaves.items():
        if "self_attn" not in path:
            continue
        layer, projection = int(path[path.index("layers") + 1]), path[-2]
        if layer not in keeps or (projection == "out_proj" and path[-1] == "bias"):
            continue
        # In Flax a kernel is `[in, out]`: heads are the output of q, k and v, and enter out_proj.
        leaves[path] = _kept(
            leaf, keeps[layer], old.head_dim, 0 if projection == "out_proj" else -1
        )
    model._adopt(config.locked())
    changed: Params = unflatten_dict(leaves)
    return changed


def cast(params: Params, dtype: Any, mask: Any) -> Params:
    """The same tree with leaves of floating type in `dtype`, where the mask's leaf is True."""

    def convert(leaf: Any, chosen: Any = True) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf).astype(dtype) if chosen and is_float else leaf

    plain = unfreeze(params)
    changed: Params = (
        jax.tree.map(convert, plain)
        if mask is None
        else jax.tree.map(convert, plain, unfreeze(mask))
    )
    return changed


def _resized(values: Array, size: int, axis: int, key: Array, std: float) -> Array:
    same = min(size, values.shape[axis])
    kept = jax.lax.slice_in_dim(values, 0, same, axis=axis)
    shape = list(values.shape)
    shape[axis] = size - same
    added = (jax.random.normal(key, shape, jnp.float32) * std).astype(values.dtype)
    return jnp.concatenate([kept, added], axis)


def _kept(values: Array, keep: list[int], width: int, axis: int) -> Array:
    places = np.array([head * width + i for head in keep for i in range(width)])
    return jnp.take(values, places, axis=axis)
