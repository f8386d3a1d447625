"""The picture of errors: layers down, parameters across, colour for the size of a difference."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from conversion.comparing import Result
from conversion.report.texts import escaped
from conversion.verifying import TensorResult

_IN_LAYER = re.compile(r"model\.decoder\.layers\.(\d{1,6})\.(.+)", re.DOTALL)
_CELL_WIDTH, _CELL_HEIGHT, _MARGIN = 30, 16, 120
_LONGEST_LABEL = 32
#: Differences up to 1e-8 have the first colour, up to 1 the last but one, larger ones the last.
_SMALLEST = -8
STEPS = -_SMALLEST + 2


def picture(tensors: Sequence[TensorResult]) -> str:
    """The tensors of layers as a grid, and the others as a row of their own, with a legend."""
    layers: dict[int, dict[str, TensorResult]] = {}
    others: dict[str, TensorResult] = {}
    for entry in tensors:
        if found := _IN_LAYER.fullmatch(entry.name):
            layers.setdefault(int(found[1]), {})[found[2]] = entry
        else:
            others[entry.name.removeprefix("model.decoder.")] = entry
    drawn = []
    if others:
        drawn.append(_grid({"outside layers": others}, "tensors outside layers"))
    if layers:
        rows = {f"layer {layer}": layers[layer] for layer in sorted(layers)}
        drawn.append(_grid(rows, "layers down, parameters across"))
    return "\n".join([_legend(), *drawn])


def shade(entry: TensorResult) -> str:
    """The class of a tensor's colour."""
    if entry.result in (Result.SHAPES, Result.ONLY_A, Result.ONLY_B):
        return "gone"
    if entry.result is Result.ROUNDED:
        return "round"
    return f"d{_step(entry.comparison.relative)}" if entry.result.is_difference else "same"


def _step(share: float) -> int:
    if not share <= 1:
        return STEPS - 1
    return 0 if share <= 0 else max(0, math.ceil(math.log10(share)) - _SMALLEST)


def _grid(rows: Mapping[str, Mapping[str, TensorResult]], title: str) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    longest = min(_LONGEST_LABEL, max(map(len, columns)))
    top = 12 + round(longest * 5.2)
    width = _MARGIN + _CELL_WIDTH * len(columns) + round(longest * 5.2)
    height = top + _CELL_HEIGHT * len(rows) + 4
    parts = [
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escaped(title)}">'
    ]
    for i, name in enumerate(columns):
        x, y = _MARGIN + _CELL_WIDTH * i + _CELL_WIDTH // 2, top - 6
        parts.append(
            f'<text x="{x}" y="{y}" transform="rotate(-50 {x} {y})">{escaped(_short(name))}</text>'
        )
    for j, (label, row) in enumerate(rows.items()):
        y = top + _CELL_HEIGHT * j
        place = f'x="{_MARGIN - 8}" y="{y + _CELL_HEIGHT - 4}"'
        parts.append(f'<text class="row" {place}>{escaped(label)}</text>')
        parts += [_cell(row[name], i, y) for i, name in enumerate(columns) if name in row]
    return "\n".join([*parts, "</svg>"])


def _cell(entry: TensorResult, column: int, y: int) -> str:
    marked = " differs" if entry.result.is_difference else ""
    said = f"{entry.name}: {entry.said}"
    if entry.comparison.largest:
        said += f", largest difference {entry.comparison.relative:.1e} of the largest value"
    return (
        f'<rect class="{shade(entry)}{marked}" x="{_MARGIN + _CELL_WIDTH * column + 1}" '
        f'y="{y + 1}" width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}">'
        f"<title>{escaped(said)}</title></rect>"
    )


def _legend() -> str:
    powers = [f"≤ 1e{_SMALLEST + step}" for step in range(STEPS - 2)]
    entries = [("same", "no difference"), ("round", "rounding alone")]
    entries += [(f"d{step}", label) for step, label in enumerate([*powers, "≤ 1", "more, or NaN"])]
    entries.append(("gone", "missing or of another shape"))
    shown = "".join(
        f'<span><svg width="22" height="14" aria-hidden="true"><rect class="{name}" x="1" y="1" '
        f'width="20" height="12"/></svg>{escaped(label)}</span>'
        for name, label in entries
    )
    return (
        '<p class="legend">Largest difference, as a share of the largest value of the tensor; '
        f"a frame marks what counts as different.<br>{shown}</p>"
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"
