"""What the tabs share: the model's choice, the box with code to copy, and exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from veena_lens.app.explorer.pictures import samples
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.explorer.told import told


@dataclass(kw_only=True, eq=False)
class Shared:
    """Components that several tabs use, and what to run when the page loads."""

    explorer: Explorer
    model: Any
    tabs: Any = None
    look_view: Any = None
    look_code: Any = None
    pair: Any = None
    opens_head: tuple[Any, Any] | None = None
    asks_at_once: bool = False
    loads: list[tuple[Any, list[Any], list[Any]]] = field(default_factory=list)

    @property
    def first_sample(self) -> str:
        """The sample that the page opens with: a happy face."""
        names = list(samples())
        return next((name for name in names if name.startswith("happy")), names[0])


def code_box(name: str) -> Any:
    """The program that makes what the tab shows."""
    with gr.Accordion("The Python that makes this", open=False, elem_id=f"{name}-box"):
        return gr.Code(language="python", interactive=False, show_label=False, elem_id=name)


def export_box(name: str, files: Callable[[Session], list[str]], explorer: Explorer) -> None:
    """A button, and the files that it makes."""

    @told
    def export(request: gr.Request) -> Any:
        return gr.update(value=files(explorer.session(request.session_hash)), visible=True)

    with gr.Row():
        button = gr.Button("Export", elem_id=f"{name}-export", scale=0, min_width=120)
        out = gr.File(label="Files", visible=False, interactive=False, file_count="multiple", elem_id=f"{name}-files")
    button.click(export, None, out, api_visibility="private")
