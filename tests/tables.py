"""The tables in the documentation that come from code: `python -m tests.tables` rewrites them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from conversion import FORMATS, LOSSES
from opt_core.checkpoint.saving import INDEX_ENDING
from opt_core.config import PRESETS, OPTConfig
from opt_core.weights import count_parameters

ROOT = Path(__file__).resolve().parents[1]


def sizes() -> str:
    """Every preset: its shape, parameters, and what the weights take in memory."""
    lines = [
        "| preset | layers | width | heads | positions | parameters | float32 | float16 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in PRESETS:
        config = OPTConfig.preset(name)
        count = count_parameters(config)
        cells = [
            f"`{name}`",
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.max_position_embeddings,
            f"{count:,}",
            f"{count * 4 / 1e9:.1f} GB",
            f"{count * 2 / 1e9:.1f} GB",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def formats() -> str:
    """Every format: what it is, its word for `--to`, its files, and what it needs."""
    lines = ["| format | `--to` | files | shards | needs |", "|---|---|---|---|---|"]
    for row in FORMATS:
        files = ", ".join(f"`{name}`" for name in row.files if not name.endswith(INDEX_ENDING))
        shards = "yes" if row.shards else "no"
        needs = f"`optlm[{row.extra}]`" if row.extra else ""
        lines.append(f"| {row.title} | `{row.name}` | {files} | {shards} | {needs} |")
    return "\n".join(lines)


def losses() -> str:
    """Every loss that may be allowed."""
    lines = ["| `--allow` | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {said} |" for name, said in LOSSES.items())])


TABLES: Mapping[str, Callable[[], str]] = {"sizes": sizes, "formats": formats, "losses": losses}

_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that readers see."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """A page with every table as the code gives it now."""
    return _PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


def main() -> None:
    """Rewrite the tables of all pages."""
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
