"""Where a tensor of the weight table lives in Hugging Face files of any age: one table, both ways.

Canonical names are `model.decoder.…` for the decoder, then `lm_head.weight`, `score.weight`,
`qa_outputs.weight` and `qa_outputs.bias`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from opt_core.checkpoint import CheckpointDamaged

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


def canonical_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Canonical to stored name, for all names of the checkpoint `where`.

    Raises CheckpointDamaged when two stored names stand for one tensor.
    """
    found: dict[str, str] = {}
    for name in stored:
        canonical = canonical_name(name)
        if canonical is None:
            continue
        if canonical in found:
            raise CheckpointDamaged(
                f"{where} holds {canonical!r} twice, as {found[canonical]!r} and as {name!r}; "
                "remove one of them"
            )
        found[canonical] = name
    return found
