"""How a report looks: on a light screen, on a dark one, and on paper."""

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1f23; --faint: #5c6570; --line: #d5dae0;
  --good: #1a7f37; --good-soft: #e3f5e7; --bad: #b42318; --bad-soft: #fdeae8;
  --same: #a9dcb3; --round: #a8cdf0; --gone: #8a94a0;
  --d0: #fff6c2; --d1: #ffeb9a; --d2: #fedc76; --d3: #feca5a; --d4: #fdb244;
  --d5: #fb9135; --d6: #f16a2b; --d7: #da4226; --d8: #b01e26; --d9: #6f0f24;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e4e8ec; --faint: #9aa4af; --line: #343b43;
    --good: #5fd17c; --good-soft: #16301d; --bad: #ff8a7d; --bad-soft: #3d1a17;
    --same: #25633a; --round: #27527d; --gone: #6d7782;
    --d0: #3a341c; --d1: #55451d; --d2: #71551e; --d3: #8f651f; --d4: #ad7322;
    --d5: #cb7f27; --d6: #e58a32; --d7: #f79a4e; --d8: #ffb27c; --d9: #ffd9c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 84rem;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 60rem; }
.faint { color: var(--faint); }
.verdict {
  margin: 1rem 0; padding: .8rem 1rem; border-left: 5px solid; border-radius: 4px;
  font-size: 1.1rem; font-weight: 600; max-width: none; overflow-wrap: anywhere;
}
.verdict.good { color: var(--good); background: var(--good-soft); border-color: var(--good); }
.verdict.bad { color: var(--bad); background: var(--bad-soft); border-color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; }
th, td { text-align: left; vertical-align: top; padding: .28rem .7rem .28rem 0; }
th { border-bottom: 2px solid var(--line); font-weight: 600; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
table.tensors td:nth-child(1) { min-width: 16rem; }
table.tensors td:nth-child(n+5):nth-child(-n+7) {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
table.tensors td:nth-child(8) { min-width: 21rem; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.bad-text { color: var(--bad); font-weight: 600; }
.good-text { color: var(--good); }
svg.heat { display: block; max-width: 100%; height: auto; margin: .5rem 0; }
svg text { fill: var(--ink); font: 10px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
svg text.row { text-anchor: end; }
svg rect.differs { stroke: var(--ink); stroke-width: 1.6; }
.legend { font-size: .82rem; color: var(--faint); max-width: none; }
.legend span { display: inline-flex; align-items: center; gap: .3rem; margin: 0 .9rem 0 0; }
COLOURS
@media print {
  :root {
    --paper: #fff; --ink: #000; --faint: #444; --line: #bbb;
    --good: #14662c; --good-soft: #fff; --bad: #9b1c12; --bad-soft: #fff;
    --same: #a9dcb3; --round: #a8cdf0; --gone: #8a94a0;
    --d0: #fff6c2; --d1: #ffeb9a; --d2: #fedc76; --d3: #feca5a; --d4: #fdb244;
    --d5: #fb9135; --d6: #f16a2b; --d7: #da4226; --d8: #b01e26; --d9: #6f0f24;
  }
  @page { size: A4 landscape; margin: 12mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { padding: 0; max-width: none; font-size: 11px; }
  .wide { overflow: visible; }
  thead { display: table-header-group; }
  tr, svg, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; }
  table { font-size: 9px; }
  table.tensors td { min-width: 0 !important; }
}
""".replace(
    "COLOURS",
    "\n".join(
        f"rect.{name} {{ fill: var(--{name}); }} .key.{name} {{ background: var(--{name}); }}"
        for name in ("same", "round", "gone", *(f"d{step}" for step in range(10)))
    ),
)
