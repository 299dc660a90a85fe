"""The page: six tabs over one choice of model, in system fonts and light colours."""

from __future__ import annotations

from typing import Any

import gradio as gr

from veena_lens.app.explorer import lens, look, neurons, pairs, patch_tab, steer_tab
from veena_lens.app.explorer.parts import Shared
from veena_lens.app.explorer.state import KEPT_SECONDS, Explorer
from veena_lens.checkpoints.files import bundled_names

TABS = (
    ("Look", "look", look.build),
    ("Lens", "lens", lens.build),
    ("Patch", "patch", patch_tab.build),
    ("Steer", "steer", steer_tab.build),
    ("Neurons", "neurons", neurons.build),
    ("Pairs", "pairs", pairs.build),
)

HEAD = '<link rel="stylesheet" href="veena/view.css">'
CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; max-width: 100% !important; padding: 12px 20px 24px !important; }
.veena-drop .icon-wrap, .veena-drop .or { display: none; }
.veena-drop .wrap { font-size: 14px; min-height: 0; padding-top: 22px; line-height: 1.3; }
.veena-go { align-self: flex-end; max-height: 46px; white-space: nowrap; padding-inline: 10px; }
.gradio-container :focus-visible { outline: 3px solid #00598f !important; outline-offset: 2px; }
.gradio-container input[type="range"]:focus-visible { outline-offset: 6px; }
.veena-thumbs { display: flex; flex-wrap: wrap; gap: 10px; padding: 4px 0; }
.veena-thumb { margin: 0; }
.veena-thumb img { display: block; border-radius: 4px; border: 1px solid #d4d8de; height: auto; }
.veena-thumb figcaption { font-size: 13px; color: #555b64; max-width: 130px; overflow-wrap: anywhere; }
.veena-figure { max-width: 100%; height: auto; background: #ffffff; border: 1px solid #d4d8de; border-radius: 6px; }
.veena-slot { min-height: 40px; color: #555b64; }
.veena-slot.veena-view { color: #1c1e21; background: #ffffff; padding: 12px; border: 1px solid #d4d8de;
  border-radius: 6px; }
.veena-asks p { font-size: 15px; color: #1c1e21; max-width: 90ch; }
.veena-notice { display: flex; gap: 12px; align-items: start; justify-content: space-between; color: #7a1f00;
  background: #fdf0ea; border: 1px solid #c1552b; border-radius: 6px; padding: 8px 12px; overflow-wrap: anywhere;
  animation: veena-appear 0.5s; }
.veena-notice[hidden] { display: none; }
.veena-close { flex: none; background: none; border: 0; color: #7a1f00; text-decoration: underline; cursor: pointer; }
@keyframes veena-appear { from { background: #f6b395; } }
.veena-of { font-size: 14px; color: #555b64; margin: 4px 0; overflow-wrap: anywhere; }
.veena-old { color: #7a1f00; font-weight: 600; }
[role="tabpanel"]:has(.veena-old) .veena-slot, [role="tabpanel"]:has(.veena-old) .veena-figure,
[role="tabpanel"]:has(.veena-old) :is(#answer, #sides, #neurons, #tokens, #drivers, #faces, #answers) {
  filter: grayscale(0.8) opacity(0.55); }
[id$="-notice"]:has(.veena-notice[hidden]) { display: none; }
:is(#patch-view, #lens-view):has(.veena-slot:not(.veena-view)) { display: none; }
[id$="-of"] { min-height: 0 !important; padding: 0 !important; }
.veena-steered { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 14px; align-items: start; }
.veena-hint p, .veena-status { color: #555b64; font-size: 14px; }
.veena-title { font-size: 15px; font-weight: 600; margin: 8px 0; color: #1c1e21; }
.veena-cellrow { display: flex; gap: 1px; margin-bottom: 1px; }
.veena-cellrow > button, .veena-cellrow > span { flex: 1 1 0; min-width: 0; }
.veena-cellrow > button { height: 26px; border: 0; padding: 0; cursor: pointer; }
.veena-cellrow > button:hover, .veena-cellrow > button:focus-visible { outline: 3px solid #000000; outline-offset: -3px;
  box-shadow: inset 0 0 0 5px #ffffff; }
.veena-cellrow > .veena-cellname { flex: 0 0 84px; font-size: 13px; color: #555b64; line-height: 26px; }
.veena-cellhead > span { font-size: 12px; color: #555b64; text-align: center; overflow: hidden; }
.veena-cellhead > .veena-cellname { text-align: left; }
.veena-cells { max-width: 900px; }
.veena-cellhead { max-width: 900px; }
.veena-scalerow { display: flex; align-items: center; gap: 8px; font-size: 13px; color: #555b64; padding: 6px 0; }
.veena-scale { width: 120px; height: 10px; border-radius: 2px; }
.veena-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 14px; }
.veena-side { border: 1px solid #d4d8de; border-radius: 6px; padding: 10px 16px; background: #ffffff; color: #1c1e21; }
.veena-side h3 { font-size: 15px; margin: 0 0 6px; }
.veena-hit { color: #00684a; font-weight: 600; } .veena-miss { color: #b03a00; font-weight: 600; }
"""


def page_theme() -> Any:
    """Return Gradio's plain theme in system fonts, with the project's blue for what can be pressed."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.gray,
        font=fonts,
        font_mono=("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"),
    )
    blue, ink, quiet = "#00598f", "#1c1e21", "#555b64"
    light = {
        "button_primary_background_fill": blue,
        "button_primary_background_fill_hover": "#00446e",
        "button_primary_text_color": "#ffffff",
        "button_secondary_text_color": ink,
        "body_text_color": ink,
        "body_text_color_subdued": quiet,
        "block_label_text_color": quiet,
        "block_title_text_color": quiet,
        "block_info_text_color": quiet,
        "input_placeholder_color": quiet,
        "color_accent": blue,
        "slider_color": blue,
    }
    # One light look: what a view draws is judged by eye, and is drawn for white paper.
    return theme.set(**light)


KNOWS_FACES = "The embedded models know drawn faces only; for photographs serve a checkpoint with --model."


def note_on(model: str) -> str:
    """Say what an embedded model knows; nothing of others."""
    return KNOWS_FACES if model in bundled_names() else ""


def build_page(explorer: Explorer) -> Any:
    """Build the page of an explorer."""
    with gr.Blocks(
        analytics_enabled=False, title="veena_lens explorer", fill_width=True, delete_cache=(600, int(KEPT_SECONDS))
    ) as demo:
        with gr.Row(equal_height=True):
            gr.Markdown("# veena_lens\nWhere in the image does it look, and why did it say that?", elem_id="title")
            model = gr.Dropdown(
                explorer.names,
                value=explorer.names[0],
                label="Model",
                info=note_on(explorer.names[0]) or None,
                elem_id="model",
                scale=0,
                min_width=330,
            )
        model.change(
            lambda name: gr.update(info=note_on(name)), model, model, api_visibility="private", show_progress="hidden"
        )
        shared = Shared(explorer=explorer, model=model)
        shared.asks_at_once = explorer.names[0] in bundled_names()
        with gr.Tabs(elem_id="tabs") as shared.tabs:
            for title, name, build in TABS:
                with gr.Tab(title, id=name, elem_id=f"tab-{name}") as shared.tab:
                    build(shared)
        for handler, inputs, outputs in shared.loads:
            demo.load(handler, inputs, outputs, api_visibility="private", show_progress="hidden")

        def leave(request: gr.Request) -> None:
            explorer.forget(request.session_hash)

        demo.unload(leave)
    return demo
