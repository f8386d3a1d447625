"""Where a row of the weight table lives in a file: one rule a kind of file, read both ways.

Canonical names are `model.decoder.…` for the decoder, then `lm_head.weight`, `score.weight`,
`qa_outputs.weight` and `qa_outputs.bias`; the canonical layout of a matrix is `[out, in]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from conversion.views import Constant, transposed
from opt_core.checkpoint import CheckpointDamaged, TensorSource
from opt_core.config import OPTConfig
from opt_core.weights import LEAVES, Head, Kind, Weight, stored_name, switched_off, table

CANONICAL = "model.decoder."

# Where a file keeps the decoder: in a model with a head, in the base model (and the first uploads
# of facebook/opt-*), in a decoder saved alone.
PLACES = (CANONICAL, "decoder.", "")


@dataclass(frozen=True)
class Stored:
    """A part of the decoder as files call it, and as the weight table does; None is left out.

    A part that ends in a dot holds tensors, any other is one.
    """

    stored: str
    canonical: str | None


# The first spelling of a part is today's. The other names of the last norm and of the projections
# are metaseq's, and with them came its version buffer.
PARTS = (
    Stored("embed_tokens.", "embed_tokens."),
    Stored("embed_positions.", "embed_positions."),
    Stored("layers.", "layers."),
    Stored("final_layer_norm.", "final_layer_norm."),
    Stored("layer_norm.", "final_layer_norm."),
    Stored("project_in.", "project_in."),
    Stored("project_in_dim.", "project_in."),
    Stored("project_out.", "project_out."),
    Stored("project_out_dim.", "project_out."),
    Stored("version", None),
)


@dataclass(frozen=True)
class Opened:
    """The tensors of a file in the canonical layout, and the name under which each was found."""

    tensors: Mapping[str, TensorSource]
    original_names: Mapping[str, str]
    #: What a file may hold besides weights, such as an optimizer's state: left behind.
    left_out: tuple[str, ...] = ()


class Rule(Protocol):
    """How one kind of file names, turns, fuses and splits the tensors of the table."""

    def opened(self, stored: Mapping[str, TensorSource], where: str) -> Opened:
        """The tensors of the checkpoint `where`, canonically named and laid out.

        A name that no rule knows stays as it is, for the weight table to judge. Raises
        CheckpointDamaged when two stored names stand for one tensor.
        """
        ...

    def stored(
        self, tensors: Mapping[str, TensorSource], config: OPTConfig, head: Head
    ) -> dict[str, TensorSource]:
        """Canonical tensors as a file of a model with this configuration and head holds them."""
        ...


@dataclass(frozen=True)
class FrameworkRule:
    """A file whose tensors are those of the table one by one, under a framework's own names.

    `spell` makes the file's name of a parameter's dotted path and the head, `path` goes back
    (None: no weight). With `complete`, the file holds also the biases and norms that a
    configuration switches off, since the classes that read it cannot do without.
    """

    framework: str
    spell: Callable[[str, Head], str] = stored_name
    path: Callable[[str], str | None] = field(default=lambda name: name)
    complete: bool = False

    def opened(self, stored: Mapping[str, TensorSource], where: str) -> Opened:
        """See `Rule.opened`."""
        tensors: dict[str, TensorSource] = {}
        names: dict[str, str] = {}
        left_out = []
        for name, source in stored.items():
            path = self.path(name)
            if path is None:
                left_out.append(name)
                continue
            module, dot, word = path.rpartition(".")
            leaf, turned = self._leaf(word)
            canonical = canonical_name(module + dot + leaf)
            if canonical is None:
                continue
            check_once(canonical, name, names, where)
            names[canonical] = name
            tensors[canonical] = transposed(source) if turned and len(source.shape) == 2 else source
        return Opened(tensors, names, tuple(left_out))

    def stored(
        self, tensors: Mapping[str, TensorSource], config: OPTConfig, head: Head
    ) -> dict[str, TensorSource]:
        """See `Rule.stored`."""
        rows = table(config, head)
        found = {
            self._name(name, rows, head): self._turned(name, rows, source)
            for name, source in tensors.items()
        }
        if self.complete:
            kind = next(iter(tensors.values())).dtype
            for row in switched_off(config, head).values():
                name = self.spell(row.path(self.framework), head)
                found[name] = Constant(row.shape, kind, row.mean)
        return found

    def _name(self, name: str, rows: Mapping[str, Weight], head: Head) -> str:
        return self.spell(rows[name].path(self.framework) if name in rows else name, head)

    def _turned(self, name: str, rows: Mapping[str, Weight], source: TensorSource) -> TensorSource:
        turned = name in rows and rows[name].transposed(self.framework)
        return transposed(source) if turned else source

    def _leaf(self, leaf: str) -> tuple[str, bool]:
        """What the canonical layout calls a parameter, and whether it is kept turned here."""
        for kind, words in LEAVES.items():
            if words[self.framework] == leaf:
                return words["torch"], kind is Kind.MATRIX and self.framework != "torch"
        return leaf, False


#: Hugging Face's own files, safetensors and PyTorch's: the canonical names and layout.
HUGGING_FACE = FrameworkRule("torch")


def canonical_name(stored: str) -> str | None:
    """The weight table's name for a stored one, None for what carries no weight.

    A name that no rule knows stays as it is, for the weight table to judge.
    """
    for place in PLACES:
        for part in PARTS:
            known = place + part.stored
            if stored == known or (known.endswith(".") and stored.startswith(known)):
                rest = stored.removeprefix(known)
                return None if part.canonical is None else CANONICAL + part.canonical + rest
    return stored


def stored_names(canonical: str) -> list[str]:
    """Every name under which a file may keep the tensor, today's first."""
    if not canonical.startswith(CANONICAL):
        return [canonical]
    name = canonical.removeprefix(CANONICAL)
    spellings = [
        part.stored + name.removeprefix(part.canonical)
        for part in PARTS
        if part.canonical is not None and name.startswith(part.canonical)
    ]
    return [place + spelling for spelling in spellings for place in PLACES]


def check_once(canonical: str, name: str, found: Mapping[str, str], where: str) -> None:
    """Raises CheckpointDamaged when the canonical name has been `found` under another one."""
    if canonical in found:
        raise CheckpointDamaged(
            f"{where} holds {canonical!r} twice, as {found[canonical]!r} and as {name!r}; "
            "remove one of them"
        )
