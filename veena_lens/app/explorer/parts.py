"""What the tabs share: views, grids of cells, figures with their alt text, boxes for files, code and exports."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from veena_lens.app.explorer.pictures import samples
from veena_lens.app.explorer.state import Explorer, Session, report_errors
from veena_lens.app.explorer.status import Status
from veena_lens.app.view.building import colours
from veena_lens.plots import theme

VIEW = """
const slot = () => element.querySelector('.veena-slot');
const base = new URL('veena/', document.baseURI);
let loaded = null, number = 0;
const say = (text) => { slot().textContent = text; };
const load = async () => {
  const value = props.value ? JSON.parse(props.value) : null;
  const mine = ++number;
  if (!value) { loaded?.destroy(); loaded = null; say(element.dataset.empty || 'Nothing to show yet.'); return; }
  try {
    const { mount } = await import(new URL('view.js', base));
    const answer = await fetch(new URL('view/' + value.token, base));
    if (!answer.ok) throw new Error(await answer.text());
    const buffer = await answer.arrayBuffer();
    if (mine !== number) return;
    loaded?.destroy();
    slot().textContent = '';
    loaded = mount(slot(), buffer, {
      open: value.open,
      pinned: (state) => trigger('select', state),
      fetch: async (key) => {
        const found = await fetch(new URL('maps/' + value.token + '?' + new URLSearchParams(key), base));
        if (!found.ok) throw new Error(await found.text());
        return found.arrayBuffer();
      },
    });
  } catch (error) { if (mine === number) { loaded = null; say(error.message); } }
};
watch('value', load);
load();
"""
CELLS = """
const base = new URL('veena/', document.baseURI);
const draw = async () => {
  const { cells } = await import(new URL('cells.js', base));
  const data = props.value ? JSON.parse(props.value) : null;
  cells(element.querySelector('.veena-slot'), data, (at) => trigger('select', at));
};
watch('value', draw);
draw();
"""


def view_slot(name: str) -> gr.HTML:
    """Make an empty place for a view; its "select" says what was pinned."""
    return _slot(name, VIEW)


def cells_slot(name: str, value: str = "") -> gr.HTML:
    """Make a place for a grid of cells; its "select" says the row and column that was clicked."""
    return _slot(name, CELLS, value)


def _slot(name: str, script: str, value: str = "") -> gr.HTML:
    template = '<div class="veena-slot"></div>'
    return gr.HTML(value=value, html_template=template, js_on_load=script, elem_id=name, apply_default_css=False)


def view_value(token: str, **opened: Any) -> str:
    """Return what a view slot shows; `opened`: layer and head to begin with."""
    return json.dumps({"token": token, **({"open": opened} if opened else {})})


def cells_value(
    values: Float[Tensor, "row column"],
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    row_name: str,
    column_name: str,
    title: str,
    unit: str = "",
    done: int | None = None,
) -> str:
    """Return what a grid of cells shows; `unit`: what the numbers are.

    NaN, for a cell that is not there yet, and infinities stay empty."""
    numbers = [[round(v, 5) if math.isfinite(v) else None for v in row] for row in values.tolist()]
    return json.dumps(
        {
            "values": numbers,
            "rows": [str(r) for r in rows],
            "columns": [str(c) for c in columns],
            "rowName": row_name,
            "columnName": column_name,
            "title": title,
            "unit": unit,
            "done": len(rows) if done is None else done,
            "colours": colours()["signed"],
            "missing": theme.MISSING,
        }
    )


def figure_html(figure: Figure, alt: str) -> str:
    """Embed a figure as an image in the page."""
    data = base64.b64encode(theme.encode(figure, "png")).decode("ascii")
    return f'<img class="veena-figure" src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">'


@dataclass(kw_only=True, eq=False)
class Shared:
    """Components that several tabs use, and what to run when the page loads."""

    explorer: Explorer
    model: Any
    tabs: Any = None
    tab: Any = None  # the one that is built now
    look: Any = None
    pair: Any = None
    asks_at_once: bool = False
    loads: list[tuple[Any, list[Any], list[Any]]] = field(default_factory=list)

    def status(self, name: str, also: Callable[[Session], Any] | None = None) -> Status:
        """Return the status of the tab that is built now."""
        return Status(self.explorer, name, self.tab, also)

    @property
    def first_sample(self) -> str:
        """Return the sample that the page opens with: a happy face."""
        names = list(samples())
        return next((name for name in names if name.startswith("happy")), names[0])


def file_box(label: str, name: str, several: bool = False) -> Any:
    """Make a place to drop one file, or several."""
    count = "multiple" if several else "single"
    return gr.File(label=label, file_count=count, type="filepath", height=96, elem_classes="veena-drop", elem_id=name)


def code_box(name: str) -> Any:
    """Make a box for the program that makes what the tab shows."""
    with gr.Accordion("The Python that makes this", open=False, elem_id=f"{name}-box"):
        return gr.Code(language="python", interactive=False, show_label=False, elem_id=name)


def export_box(name: str, files: Callable[[Session], list[str]], explorer: Explorer, status: Status) -> None:
    """Make a button, and a place for the files that it writes."""

    @report_errors
    def export(request: gr.Request) -> Any:
        session = explorer.session(request.session_hash)
        return gr.update(value=files(session), visible=True)

    with gr.Row():
        button = gr.Button("Export", elem_id=f"{name}-export", scale=0, min_width=120)
        out = gr.File(label="Files", visible=False, interactive=False, file_count="multiple", elem_id=f"{name}-files")
    status.listen([button.click], export, None, out, keeps=True)
