"""The one rule for metaseq's tensors: names, the fused projection, and what model parallelism cuts.

github.com/facebookresearch/metaseq, the project that OPT comes from, calls the decoder `decoder`
and its last norm `layer_norm`; the output projection shares the embedding's storage. Its fused
projection is called qkv, and holds K, V and Q in this order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import accumulate
from math import prod

import numpy as np

from conversion.names import Opened, canonical_name, check_once, stored_names
from conversion.views import Constant, Joined, Part
from opt_core.checkpoint import CheckpointDamaged, StoredTensor, TensorSource
from opt_core.config import OPTConfig
from opt_core.weights import EMBEDDING_NAME, LM_HEAD_NAME, Head, table

#: What a fused projection holds, in this order, each a third of its rows.
FUSED = "kvq"
_FUSED_NAME = "qkv_proj"
_DECODER = "decoder."
_HEAD = "decoder.output_projection.weight"
# Written as metaseq writes it; with 2 or less, or without it, its first loader ran the model
# without the last norm.
_VERSION = "decoder.version"
_VERSION_VALUE = 3.0


class MetaseqRule:
    """How metaseq's single files name and fuse the tensors of the table."""

    def opened(self, stored: Mapping[str, TensorSource], where: str) -> Opened:
        """See `conversion.names.Rule`."""
        tensors: dict[str, TensorSource] = {}
        names: dict[str, str] = {}
        for name, source in stored.items():
            for spelling, part in _separate(name, source, where).items():
                canonical = LM_HEAD_NAME if name == _HEAD else canonical_name(spelling)
                if canonical is not None:
                    check_once(canonical, name, names, where)
                    names[canonical], tensors[canonical] = name, part
        if _is_no_head_of_its_own(tensors):
            del tensors[LM_HEAD_NAME], names[LM_HEAD_NAME]
        return Opened(tensors, names)

    def stored(
        self, tensors: Mapping[str, TensorSource], config: OPTConfig, head: Head
    ) -> dict[str, TensorSource]:
        """See `conversion.names.Rule`: separate projections, and `decoder.version`."""
        version = Constant((1,), np.dtype(np.float32), _VERSION_VALUE)
        return {
            _VERSION: version,
            **{_stored_name(name): source for name, source in tensors.items()},
        }


METASEQ = MetaseqRule()


def is_head(stored: str) -> bool:
    """Whether metaseq calls the output projection so."""
    return stored == _HEAD


def blocks_of(stored: str) -> int:
    """How many tensors a stored one holds, one under another: three if it is fused."""
    return len(FUSED) if f".{_FUSED_NAME}." in stored else 1


def split_axis(stored: str) -> int | None:
    """The axis that model parallelism cuts, from the weight table; None: the same in every part."""
    spelling = stored.replace(f".{_FUSED_NAME}.", f".{FUSED[0]}_proj.")
    canonical = LM_HEAD_NAME if stored == _HEAD else canonical_name(spelling)
    return _axes().get(re.sub(r"\.layers\.[0-9]+\.", ".layers.0.", canonical or ""))


def rows(source: TensorSource, start: int, stop: int) -> TensorSource:
    """Some rows of a tensor, as near to the file as they can be had."""
    if isinstance(source, StoredTensor):
        width = prod(source.shape[1:]) if source.strides is None else source.strides[0]
        offset = source.offset + start * width * source.dtype.itemsize
        return replace(source, offset=offset, shape=(stop - start, *source.shape[1:]))
    if isinstance(source, Joined) and source.axis == 0:
        ends = accumulate(one.shape[0] for one in source.sources)
        begun = [
            (one, end - one.shape[0], end) for one, end in zip(source.sources, ends, strict=True)
        ]
        found = tuple(
            rows(one, max(start, begin) - begin, min(stop, end) - begin)
            for one, begin, end in begun
            if max(start, begin) < min(stop, end)
        )
        if found:
            return found[0] if len(found) == 1 else Joined(found, 0)
    return Part(source, 0, start, stop)


def thirds(source: TensorSource) -> list[TensorSource]:
    """K, V and Q of a fused tensor."""
    height = source.shape[0] // len(FUSED)
    return [rows(source, i * height, (i + 1) * height) for i in range(len(FUSED))]


def check_fused(name: str, source: TensorSource, where: str) -> None:
    """Raises CheckpointDamaged unless a fused tensor's rows can be shared out."""
    if not source.shape or source.shape[0] % len(FUSED):
        raise CheckpointDamaged(
            f"{where}: {name!r} of shape {source.shape} should hold K, V and Q, one under another: "
            f"expected a number of rows that {len(FUSED)} divides"
        )


def _separate(name: str, source: TensorSource, where: str) -> dict[str, TensorSource]:
    """A stored tensor, or the three that it holds under the names of separate projections."""
    if blocks_of(name) == 1:
        return {name: source}
    check_fused(name, source, where)
    spellings = [name.replace(f".{_FUSED_NAME}.", f".{letter}_proj.") for letter in FUSED]
    return dict(zip(spellings, thirds(source), strict=True))


def _is_no_head_of_its_own(tensors: Mapping[str, TensorSource]) -> bool:
    """Whether the output projection is the embedding, or a mere slice of it.

    It lies where the embedding lies in metaseq's own files. Its tools that merge model-parallel
    parts keep one part's slice of it. Anything else is left for the weight table to judge.
    """
    head, embedding = tensors.get(LM_HEAD_NAME), tensors.get(EMBEDDING_NAME)
    if head is None or embedding is None:
        return False
    is_slice = head.shape[1:] == embedding.shape[1:] and head.shape[:1] < embedding.shape[:1]
    return head == embedding or is_slice


def _stored_name(canonical: str) -> str:
    """Metaseq's name: its spelling is the later one where there are two."""
    if canonical == LM_HEAD_NAME:
        return _HEAD
    spellings = [name for name in stored_names(canonical) if name.startswith(_DECODER)]
    return spellings[-1] if spellings else canonical


@cache
def _axes() -> dict[str, int | None]:
    """The axis of every row of the weight table, for a model of one layer with all there can be."""
    config = OPTConfig(
        num_hidden_layers=1,
        word_embed_proj_dim=512,
        do_layer_norm_before=True,
        tie_word_embeddings=False,
    )
    return {name: row.split for name, row in table(config).items()}
