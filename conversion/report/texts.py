"""Texts of a report: nothing that a file says may be taken for markup, or hide what it is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """A text with its control characters, and those that turn or hide others, shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped(text: object) -> str:
    """A text as it may stand in HTML and in SVG, between tags and in attributes."""
    return html.escape(printable(str(text)))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, name: str = "") -> str:
    """A table of cells that are HTML already; `name` is its class."""
    head = "".join(f'<th scope="col">{escaped(heading)}</th>' for heading in headings)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{escaped(name)}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def code(text: object) -> str:
    """A name or a checksum."""
    return f"<code>{escaped(text)}</code>"


def size(count: int) -> str:
    """Bytes: exactly, and as people read them."""
    amount, units = float(count), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 1000 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{count:,} bytes" + ("" if unit == "bytes" else f" ({amount:.1f} {unit})")
