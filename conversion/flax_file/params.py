"""Where tensors lie in the tree of a Flax model's parameters, in any file that holds such a tree.

A stored name is the keys on the way to a tensor, joined by `/`.
"""

from conversion.names import FrameworkRule
from opt_core.weights import Head, stored_name

#: Around the parameters, where not they alone but the state of a training was saved.
PARAMS = "params"
#: What lies beside them there.
BESIDE_PARAMS = frozenset({"opt_state", "step", "tx", "dropout_rng", "batch_stats"})


def is_weight(name: str) -> bool:
    """Whether a stored name is not that of what a training keeps beside the parameters."""
    return name.partition("/")[0] not in BESIDE_PARAMS


def _spell(path: str, head: Head) -> str:
    return stored_name(path, head).replace(".", "/")


def _path(name: str) -> str | None:
    return name.removeprefix(PARAMS + "/").replace("/", ".") if is_weight(name) else None


#: The parameters of our models.
OURS = FrameworkRule("flax", spell=_spell, path=_path)
#: The parameters of transformers' Flax models, whose layers always have biases and norms.
TRANSFORMERS = FrameworkRule("flax", spell=_spell, path=_path, complete=True)
