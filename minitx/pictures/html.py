"""A self-contained HTML page: text, tables and SVG pictures in one file.

Nothing is loaded from anywhere. Without JavaScript everything is there; with it, a click on a
heading sorts its table. Dark where the reader's system is.
"""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #ffffff; --faint: #d8d8dc;
        --shade: #f4f4f6; --link: #0072b2; --soft: #5c5c64; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17171a; --faint: #3a3a40; --shade: #232328; --link: #6db8ea;
          --soft: #a4a4ac; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 82rem; background: var(--paper);
       color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 0.2rem; }
a { color: var(--link); }
p { max-width: 60rem; margin: 0.4rem 0; }
code, table, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
.soft { color: var(--soft); }
.chart, .wide { overflow-x: auto; margin: 0.8rem 0; }
.chart svg { max-width: 100%; height: auto; border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem 0.15rem 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid var(--faint); vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child, .word { text-align: left; }
tbody tr:nth-child(even) { background: var(--shade); }
caption { text-align: left; color: var(--soft); padding-bottom: 0.2rem;
          font-family: system-ui, sans-serif; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
.sortable th { cursor: pointer; }
"""

# A click on a heading sorts the rows by that column: numbers by value, the rest as text.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.classList.add("sortable");
  table.querySelectorAll("th").forEach((heading, column) => {
    let up = false;
    heading.addEventListener("click", () => {
      up = !up;
      const value = (row) => {
        const text = row.cells[column] ? row.cells[column].textContent : "";
        const number = parseFloat(text.replace(/[~,+]/g, ""));
        return isNaN(number) ? text : number;
      };
      const body = table.tBodies[0];
      [...body.rows]
        .sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          const order = typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1;
          return up ? order : -order;
        })
        .forEach((row) => body.append(row));
    });
  });
}
"""


def page(title: str, body: Iterable[str]) -> str:
    """The page; body: pieces of HTML."""
    inside = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{inside}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def heading(level: int, text: str, name: str = "") -> str:
    """name: what links to it say, as ``#name``."""
    at = f' id="{escape(name)}"' if name else ""
    return f"<h{level}{at}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """kind: "soft" for what may be skipped."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def links(names: Iterable[tuple[str, str]]) -> str:
    """(name of a heading, words)"""
    made = [f'<a href="#{escape(name)}">{escape(words)}</a>' for name, words in names]
    return f"<nav>{' '.join(made)}</nav>"


def chart(picture) -> str:
    """An ``Svg``, in place."""
    return f'<div class="chart">{picture}</div>'


def html_table(rows: Sequence[Sequence[str]], caption: str = "", words: int = 1) -> str:
    """The first row are the headings; the first ``words`` columns are left-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        made = []
        for column, cell in enumerate(cells):
            kind = ' class="word"' if column < words else ""
            made.append(f"<{tag}{kind}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    top, *body = rows
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    lines = "\n".join(line(cells, "td") for cells in body)
    return (
        f'<div class="wide"><table>{said}<thead>{line(top, "th")}</thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
