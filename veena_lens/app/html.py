"""A self-contained HTML page: sections of text, tables, images, figures and interactive views, in one file.

Everything is embedded, and the page's policy forbids it to load anything, so that a report still opens from a mail in
ten years. It follows the reader's light or dark setting, narrows to small windows and prints with every folded part
open; every text is escaped and every image has an alt text.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from PIL import Image

from veena_lens import plots
from veena_lens.long_runs import write_file
from veena_lens.plots.theme import Format

Tone = Literal["good", "bad", "quiet"]
LARGEST_IMAGE = 640  # pixels; a page of photographs stays small enough to mail
MANY_COLUMNS = 5  # of a table that takes the page's width
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CLASS_NUMBER = ' class="number"'
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
VIEW_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Thumbnail:
    """An image as a table cell or in a row of images; `alt` says in words what it shows."""

    image: Image.Image
    alt: str
    caption: str = ""


Cell = str | int | float | bool | None | Thumbnail


@dataclass
class Report:
    """Collects the parts of a page in order; `save` writes it."""

    title: str
    lead: str = ""
    _parts: list[str] = field(default_factory=list, repr=False)
    _headings: list[tuple[str, str]] = field(default_factory=list, repr=False)
    _has_view: bool = field(default=False, repr=False)

    def section(self, heading: str, *paragraphs: str) -> Report:
        """Start a section; the contents at the top of the page lead to it."""
        self._parts.append(self._heading(heading))
        return self.text(*paragraphs)

    @contextmanager
    def folded(self, heading: str, *paragraphs: str, is_open: bool = False) -> Iterator[Report]:
        """Start a section that a click on its heading opens, inside a `with` block; on paper it is open.

        is_open: show it open at first."""
        self._parts.append(f"<details{' open' if is_open else ''}><summary>{self._heading(heading)}</summary>")
        yield self.text(*paragraphs)
        self._parts.append("</details>")

    @contextmanager
    def side_by_side(self) -> Iterator[Report]:
        """Put what is added inside a `with` block side by side where the window is wide enough."""
        self._parts.append('<div class="beside">')
        yield self
        self._parts.append("</div>")

    def _heading(self, heading: str) -> str:
        """Return a heading that the contents lead to."""
        stem = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        taken = {name for name, _ in self._headings}
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        self._headings.append((name, heading))
        return f'<h2 id="{name}">{escape(heading)}</h2>'

    def text(self, *paragraphs: str) -> Report:
        self._parts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]
        return self

    def points(self, *points: str, title: str = "") -> Report:
        """Add a list of findings, a sentence or two each, below a title if one is given."""
        head = f"<h3>{escape(title)}</h3>" if title else ""
        items = "".join(f"<li>{escape(point)}</li>" for point in points)
        self._parts.append(f'<div>{head}<ul class="points">{items}</ul></div>')
        return self

    def view(self, page: str, title: str, *, height: int = 900) -> Report:
        """Add an interactive view, a page in itself (`ExplorerView.html`), in a frame `height` pixels tall.

        The frame runs its own script, and can reach neither this page nor anything else."""
        self._has_view = True
        self._parts.append(
            f'<iframe sandbox="allow-scripts" title="{escape(title, quote=True)}" height="{height}" '
            f'srcdoc="{escape(page, quote=True)}"></iframe>'
        )
        return self

    def links(self, links: Sequence[tuple[str, str]]) -> Report:
        """Add links to pages beside this one: (text, relative address)."""
        items = "".join(f'<li><a href="{escape(to, quote=True)}">{escape(text)}</a></li>' for text, to in links)
        self._parts.append(f"<ul>{items}</ul>")
        return self

    def code(self, text: str) -> Report:
        """Add lines verbatim, in a fixed-width type."""
        self._parts.append(f"<pre><code>{escape(text)}</code></pre>")
        return self

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        caption: str = "",
        tones: Mapping[str, Tone] | None = None,
    ) -> Report:
        """Add a table; a cell whose text is in `tones` gets that tone. Raises: ValueError for a row of another
        length."""
        for place, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"Row {place} has {len(row)} cells; the table has {len(columns)} columns.")
        numeric = [bool(rows) and all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
        head = "".join(
            f'<th scope="col"{CLASS_NUMBER if right else ""}>{escape(column)}</th>'
            for column, right in zip(columns, numeric, strict=True)
        )
        body = "".join(f"<tr>{''.join(_cell(cell, tones or {}) for cell in row)}</tr>\n" for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        full = ' class="full"' if len(columns) >= MANY_COLUMNS else ""
        self._parts.append(
            f'<div class="wide"><table{full}>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
        )
        return self

    def figure(self, figure: Figure, *, alt: str, caption: str = "", format: Format = "png") -> Report:
        """Add a figure with its caption; `alt` says in words what it shows."""
        kind = "svg+xml" if format == "svg" else "png"
        width = round(figure.get_figwidth() * 96)
        image = _img(plots.encode(figure, format), kind, alt, width)
        self._parts.append(f"<figure>{image}{_caption(caption)}</figure>")
        return self

    def images(self, images: Sequence[Thumbnail], *, caption: str = "", width: int = 160) -> Report:
        """Add a row of images, each over its own caption, that wraps where the window is narrow."""
        shown = "".join(
            f'<figure class="picture">{_img(_png(p.image), "png", p.alt, width)}{_caption(p.caption)}</figure>'
            for p in images
        )
        self._parts.append(f'<div class="pictures">{shown}</div>')
        return self.text(caption) if caption else self

    def html(self) -> str:
        """Return the whole page."""
        links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading in self._headings)
        contents = ""
        if len(self._headings) > 1:
            contents = f'<nav aria-label="Contents"><strong>Contents</strong><ul>{links}</ul></nav>'
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        body = "\n".join(self._parts)
        policy = VIEW_POLICY if self._has_view else POLICY
        title = escape(self.title)
        return PAGE.format(title=title, policy=policy, style=STYLE, lead=lead, contents=contents, body=body)

    def save(self, path: str | Path) -> Path:
        """Write the page in one step and return its path. Raises: OSError where the disk is full; what was there
        before is kept."""
        path = Path(path)
        write_file(path, self.html())
        return path


def _is_number(cell: Cell) -> bool:
    """Return True for a cell that stands to the right, as numbers do; an empty one stands with them."""
    if isinstance(cell, (bool, Thumbnail)):
        return False
    return cell is None or not isinstance(cell, str) or not cell or NUMBER.fullmatch(cell) is not None


def _cell(cell: Cell, tones: Mapping[str, Tone]) -> str:
    if isinstance(cell, Thumbnail):
        return f"<td>{_img(_png(cell.image), 'png', cell.alt, 72)}</td>"
    if isinstance(cell, float):
        return f'<td class="number">{cell:.3g}</td>'
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f'<td class="number">{cell}</td>'
    text = "" if cell is None else str(cell)
    tone = f' class="{tones[text]}"' if text in tones else CLASS_NUMBER if NUMBER.fullmatch(text) else ""
    return f"<td{tone}>{escape(text)}</td>"


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _img(data: bytes, kind: str, alt: str, width: int) -> str:
    if not alt.strip():
        raise ValueError("An image needs an alt text: say in words what it shows.")
    source = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/{kind};base64,{source}" alt="{escape(alt, quote=True)}" width="{width}">'


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    small = image.convert("RGB")
    small.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #5c626b; --paper: #ffffff; --card: #f4f5f7;
  --line: #d9dce1; --link: #0058a3; --good: #00684a; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --quiet: #a5abb5; --paper: #16181c; --card: #22262c;
  --line: #3a3f47; --link: #7cc0ff; --good: #5fd3a8; --bad: #ff9d6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: .8rem 0 .2rem; }
p, .points { max-width: 90ch; }
nav { border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem; font-size: .95rem; }
.lead { font-size: 1.05rem; color: var(--quiet); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: .3rem 0 0; list-style: none; }
.points li { margin: .4rem 0; }
details { border-top: 1px solid var(--line); margin-top: 1.6rem; }
summary { cursor: pointer; padding: .6rem 0; }
summary h2 { display: inline; border: 0; margin: 0; padding: 0; }
details[open] > summary { margin-bottom: .6rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem; }
iframe { width: 100%; border: 1px solid var(--line); border-radius: 6px; background: #ffffff; }
a { color: var(--link); }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; vertical-align: middle; }
figure > img { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 6px; }
.picture > img, td > img { padding: 0; border-radius: 4px; }
td > img { max-width: none; }
figcaption { color: var(--quiet); font-size: .9rem; max-width: 90ch; margin-top: .4rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.picture { margin: 0; max-width: 200px; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .93rem; }
table.full { width: 100%; }
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: middle; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.quiet { color: var(--quiet); }
pre { background: var(--card); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .88rem; }
@media print {
  @page { margin: 14mm; }
  :root { --ink: #000000; --quiet: #444444; --paper: #ffffff; --card: #f4f5f7; --line: #bbbbbb; --link: #000000;
    --good: #00553c; --bad: #8f2e00; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav, iframe { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
  h2, summary { break-after: avoid; }
  figure, tr, .pictures { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding-right: .5rem; }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{lead}
{contents}
{body}
</main>
</body>
</html>
"""
