"""The whole page: what was compared, the verdict, the picture, every tensor, what took part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from conversion.comparing import Result
from conversion.report.logits import Logits
from conversion.report.picture import picture, shade
from conversion.report.style import STYLE
from conversion.report.texts import code, escaped, size, table
from conversion.verifying import TensorResult, Verdict, Verification
from opt_core.checkpoint import Checkpoint, size_of

#: The files of one checkpoint: path, bytes, sha256.
Files = Sequence[tuple[Path, int, str]]

# Whatever a file's text might be: a browser runs and fetches nothing for this page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(
    verified: Verification,
    *,
    given: tuple[str, str],
    files: tuple[Files, Files],
    logits: Sequence[Logits] = (),
    not_run: Sequence[str] = (),
    versions: Mapping[str, str],
    when: datetime,
) -> str:
    """A complete HTML document that needs no other file, no script and no network.

    `given` are A and B as the user named them, `not_run` the frameworks that are not installed,
    `when` the time in UTC.
    """
    title = f"{given[0]} and {given[1]}"
    sections = [
        _head(verified, title, when, logits),
        "<h2>What was compared</h2>",
        _compared(verified, given, files),
        "<h2>Differences by layer</h2>",
        picture(verified.tensors),
        *_logits(logits, not_run),
        "<h2>Configuration</h2>",
        _configuration(verified),
        *_companions(verified),
        "<h2>Tensors</h2>",
        _tensors(verified),
        "<h2>Versions</h2>",
        table(["what", "version"], [(escaped(k), escaped(v)) for k, v in versions.items()]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>optlm verify: {escaped(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        "<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _head(verified: Verification, title: str, when: datetime, logits: Sequence[Logits]) -> str:
    is_good = verified.verdict is not Verdict.DIFFERENT
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="faint">Compared by optlm verify, {when:%Y-%m-%d %H:%M:%S} UTC.</p>',
        _verdict(verified.sentence, is_good),
    ]
    if logits:
        failed = [row.title for row in logits if not row.holds]
        said = f"logits: {', '.join(failed)} beyond the bound" if failed else _WITHIN
        parts.append(_verdict(said, not failed))
    return "\n".join(parts)


_WITHIN = "logits: every one that was computed is within its bound"


def _verdict(said: str, is_good: bool) -> str:
    mark = "✓" if is_good else "✗"
    return f'<p class="verdict {"good" if is_good else "bad"}">{mark} {escaped(said)}</p>'


def _compared(verified: Verification, given: tuple[str, str], files: tuple[Files, Files]) -> str:
    sides = verified.a, verified.b
    rows = [
        ["given as", *map(code, given)],
        ["opened at", *(code(side.path) for side in sides)],
        ["format", *(escaped(side.format) for side in sides)],
        ["tensors", *(_content(side) for side in sides)],
        ["types", *(_types(side) for side in sides)],
        ["files", *(size(sum(entry[1] for entry in listed)) for listed in files)],
    ]
    listed = [
        [side, code(path.name), f"{count:,}", code(total)]
        for side, found in zip("AB", files, strict=True)
        for path, count, total in found
    ]
    return "\n".join(
        [
            table(["", "A", "B"], rows, name="compared"),
            "<p></p>",
            table(["", "file", "bytes", "sha256"], listed, name="files"),
        ]
    )


def _content(side: Checkpoint) -> str:
    return f"{len(side.tensors)}, {size(sum(map(size_of, side.tensors.values())))}"


def _types(side: Checkpoint) -> str:
    found = Counter(str(tensor.dtype) for tensor in side.tensors.values())
    return escaped(", ".join(f"{kind} ({count})" for kind, count in found.items()))


def _logits(logits: Sequence[Logits], not_run: Sequence[str]) -> Iterator[str]:
    if not logits:
        return
    yield "<h2>Logits</h2>"
    yield (
        "<p>The largest difference to the float64 reference in NumPy, and of A to B, as shares of "
        "the largest logit; three short rows of fixed tokens, two of them padded.</p>"
    )
    rows = (
        [escaped(row.title), *map(_share, (row.a, row.b, row.between)), _held(row)]
        for row in logits
    )
    yield table(["", "A to reference", "B to reference", "A to B", ""], rows)
    if not_run:
        yield f"<p>Not installed, and not run: {escaped(', '.join(not_run))}.</p>"


def _held(row: Logits) -> str:
    if row.holds:
        return '<span class="good-text">within bounds</span>'
    return f'<span class="bad-text">{escaped(row.said)}</span>'


def _share(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _configuration(verified: Verification) -> str:
    if verified.fields is None:
        return "<p>One of the two has no config.json: configurations were not compared.</p>"
    if not verified.fields:
        return "<p>No field differs.</p>"
    rows = []
    for field in verified.fields:
        values = ("absent" if v is None else code(v) for v in (field.a, field.b))
        weighed = '<span class="bad-text">differs</span>'
        rows.append(
            [code(field.name), *values, weighed if field.is_difference else "informational"]
        )
    return table(["field", "A", "B", ""], rows)


def _companions(verified: Verification) -> Iterator[str]:
    if not verified.files:
        return
    yield "<h2>Files beside the weights</h2>"
    yield "<p>Tokenizer and generation options. They do not count for the verdict.</p>"
    rows = ([code(f.name), escaped(f.said), _checksums(f.sha256)] for f in verified.files)
    yield table(["file", "result", "sha256"], rows)


def _tensors(verified: Verification) -> str:
    worst = {entry.name for entry in verified.differing}
    rest = [entry for entry in verified.tensors if entry.name not in worst]
    headings = ["tensor", "shape", "type", "result", "largest difference"]
    headings += ["share of largest value", "values that differ", "sha256 of the values"]
    rows = (_row(entry) for entry in (*verified.differing, *rest))
    return "\n".join(
        [
            "<p>What differs stands first. Checksums are of the values in the layout of PyTorch "
            "([out, in]), in C order and in the stored type.</p>",
            table(headings, rows, name="tensors"),
        ]
    )


def _row(entry: TensorResult) -> list[str]:
    found = entry.comparison
    key = f'<span class="key {shade(entry)}"></span>'
    said = escaped("; ".join([entry.said, *found.notes]))
    result = f'<span class="bad-text">{said}</span>' if entry.result.is_difference else said
    has_gap = entry.result in (Result.DIFFERENT, Result.ROUNDED)
    where = f" first at {list(found.first)}" if found.first is not None else ""
    return [
        _named(entry),
        _both(entry, "shape"),
        _both(entry, "dtype"),
        key + result,
        f"{found.largest:.3g}" if has_gap else "",
        f"{found.relative:.1e}" if has_gap else "",
        escaped(f"{found.count:,}{where}" if found.count else ""),
        _checksums(found.sha256),
    ]


def _named(entry: TensorResult) -> str:
    """The canonical name, and under it the names in the files where they are others."""
    stored = [
        f'<br><span class="faint">{side}: {code(kept.name)}</span>'
        for side, kept in (("A", entry.a), ("B", entry.b))
        if kept is not None and kept.name != entry.name
    ]
    return code(entry.name) + "".join(stored)


def _both(entry: TensorResult, what: str) -> str:
    values = [
        " x ".join(map(str, kept.shape)) or "one value" if what == "shape" else kept.dtype
        for kept in (entry.a, entry.b)
        if kept is not None
    ]
    return escaped(" / ".join(dict.fromkeys(values)))


def _checksums(sums: tuple[str | None, str | None]) -> str:
    a, b = sums
    if a == b or b is None:
        return code(a)
    if a is None:
        return code(b)
    return f"A: {code(a)}<br>B: {code(b)}"
