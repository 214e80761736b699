"""One HTML file without anything outside it: tables, pictures and text, for wide and narrow, light and dark screens."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LONG = 40  # characters of a cell that may take several lines

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --muted: #666; --line: #ddd; --ground: #fff; --raised: #f6f7f9;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --muted: #a0a4ab; --line: #3a3d44; --ground: #16181c;
  --raised: #1f2227; --accent: #6db9e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 4rem; max-width: 78rem; color: var(--ink);
  background: var(--ground); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 0.3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.5rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.4rem; }
p { max-width: 46rem; margin: 0.5rem 0; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; margin: 0.8rem 0; }
code, pre { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; margin: 0.4rem 0; }
.muted, figcaption, caption { color: var(--muted); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.6rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.3rem; caption-side: top; }
th, td { padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td.long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
td.number, th.number { text-align: right; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; border-radius: 4px; background: #fff; display: block; }
table.maps td, table.maps th { border: 0; padding: 0.12rem 0.25rem; text-align: center; vertical-align: middle; }
table.maps tbody th { text-align: right; white-space: normal; min-width: 6.5rem; font-weight: 400; font-size: 0.82rem;
  position: sticky; left: 0; background: var(--ground); z-index: 1; }
table.maps svg { display: block; width: 5.6rem; height: auto; border-radius: 3px; }
table.maps small { color: var(--muted); font-size: 0.72rem; }
table.heat td { text-align: right; padding: 0.25rem 0.5rem; border: 1px solid var(--ground); }
details { margin: 0.2rem 0; }
summary { cursor: pointer; color: var(--accent); }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; `body` is HTML."""

    anchor: str
    title: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file. `lead` is HTML."""
    links = "".join(f'<a href="#{each.anchor}">{text(each.title)}</a>' for each in sections)
    parts = "\n".join(
        f'<section id="{each.anchor}">\n<h2>{text(each.title)}</h2>\n{each.body}\n</section>' for each in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n{lead}\n"
        f"<nav>{links}</nav>\n{parts}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """As text that HTML shows."""
    return html.escape(str(value))


def paragraph(*sentences: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{text(' '.join(sentences))}</p>"


def note(*sentences: str) -> str:
    """Plain text as a paragraph of less weight."""
    return f'<p class="muted">{text(" ".join(sentences))}</p>'


class Markup(str):
    """HTML already: a table cell that is not escaped."""

    __slots__ = ()


def table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "", numbers_from: int = 1) -> str:
    """A table that scrolls sideways by itself on a narrow screen; columns from `numbers_from` on hold numbers."""

    def cell(tag: str, place: int, value: object) -> str:
        name = "number" if place >= numbers_from else "long" if len(str(value)) > _LONG else ""
        kind = f' class="{name}"' if name else ""
        return f"<{tag}{kind}>{value if isinstance(value, Markup) else text(value)}</{tag}>"

    head = "".join(cell("th", place, value) for place, value in enumerate(header))
    body = "\n".join(f"<tr>{''.join(cell('td', place, value) for place, value in enumerate(row))}</tr>" for row in rows)
    above = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{above}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def png(data: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def figures(pictures: Iterable[tuple[bytes, str]]) -> str:
    """PNG pictures with their descriptions, side by side where there is room."""
    shown = "\n".join(
        f'<figure><img src="{png(data)}" alt="{text(description)}" loading="lazy"></figure>'
        for data, description in pictures
    )
    return f'<div class="figures">\n{shown}\n</div>'


def details(summary: str, body: str) -> str:
    """HTML that is shown when asked for."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"
