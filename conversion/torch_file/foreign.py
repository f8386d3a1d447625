"""Stand-ins for what other libraries keep in a checkpoint beside its tensors; they do nothing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ForeignClass:
    """A class or a function of another library, by its name alone."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class Foreign:
    """What a file makes of such a class: its arguments and its state, as plain values.

    Two are equal when they are one object, and none is shown: they may hold each other.
    """

    name: str
    arguments: tuple[object, ...]
    state: object = None
    items: list[object] = field(default_factory=list)
    entries: dict[object, object] = field(default_factory=dict)


# What training states hold besides tensors: the arguments of the command line, OmegaConf's
# configurations, enumerations of metaseq's options, NumPy's scalars, and types by name.
_NAMES = (
    "argparse.Namespace",
    *("collections.defaultdict", "collections.Counter"),
    *("copy_reg._reconstructor", "copyreg._reconstructor", "_codecs.encode"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *("metaseq.dataclass.constants.Choices", "fairseq.dataclass.constants.Choices"),
    *("pathlib.Path", "pathlib.PosixPath", "torch.device", "typing.Any"),
)
_NODES = ("Any", "Boolean", "Enum", "Float", "Integer", "Path", "String")
_TYPES = ("bool", "dict", "float", "int", "list", "object", "set", "str", "tuple")

FOREIGN = {name: ForeignClass(name) for name in _NAMES}
FOREIGN |= {name: ForeignClass(name) for word in _NODES if (name := f"omegaconf.nodes.{word}Node")}
FOREIGN |= {
    name: ForeignClass(name)
    for word in _TYPES
    for name in (f"builtins.{word}", f"__builtin__.{word}")
}


def entries_of(value: object) -> dict[str, object]:
    """The named entries of a dict, of a namespace or of one of OmegaConf's containers."""
    if isinstance(value, Foreign):
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state)
    if not isinstance(value, dict):
        return {}
    return {key: _plain(entry) for key, entry in value.items() if isinstance(key, str)}


def _plain(value: object) -> object:
    """A value, taken out of the node or the enumeration's member that holds it."""
    if isinstance(value, Foreign) and isinstance(value.state, dict) and "_val" in value.state:
        value = value.state["_val"]
    if isinstance(value, Foreign) and value.name.endswith(".Choices") and value.arguments:
        value = value.arguments[0]
    return value
