"""The view as a page from disk: hovering, pinning, keys, contrast, speed, and no wish for a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.app.browser.conftest import low_contrast
from tests.app.view.large import large_cache, large_picture
from tests.app.view.sinking import SINKS, sinking_cache
from veena_lens import HookedVLM
from veena_lens.app.view import ExplorerView
from veena_lens.app.view.bundles import Coded
from veena_lens.app.view.page import script
from veena_lens.checkpoints.files import bundled_pairs

QUESTION = "how does the person in the picture feel?"
STATE = "document.querySelector('#view').veenaView.state"


@pytest.fixture(scope="module")
def view() -> ExplorerView:
    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    happy, neutral = next(p for p in bundled_pairs("test") if p[0].emotion == "happy")
    direction = torch.randn(8, 192, generator=torch.Generator().manual_seed(0))
    return ExplorerView.from_run(
        model,
        (happy.open(), QUESTION),
        answer=True,
        other=neutral.open(),
        directions={"noise": direction},
        words=[" happy", " sad"],
    )


@pytest.fixture
def page(view: ExplorerView, tmp_path: Path, open_page: Callable[..., Any]) -> Any:
    opened = open_page(view.save(tmp_path / "view.html").as_uri(), offline=True)
    opened.wait_for_selector(".vv-token")
    return opened


def at_cell(page: Any, row: int, column: int) -> dict[str, float]:
    """Where a cell of the first image's 8 x 8 grid lies on the page."""
    box = page.locator(".vv-picture canvas").first.bounding_box()
    return {"x": box["x"] + (column + 0.5) * box["width"] / 8, "y": box["y"] + (row + 0.5) * box["height"] / 8}


def test_hovered_token_shows_where_it_looks(page: Any, view: ExplorerView) -> None:
    page.get_by_label("Layer", exact=True).select_option("0")
    page.get_by_label("Head", exact=True).select_option("3")
    token = page.locator(".vv-answer", has_text="happy")
    token.hover()
    page.wait_for_function(f"{STATE}.hoverQuery !== null")
    own = int(token.get_attribute("data-at") or -1)
    for label, position, where in (
        (None, own - 1, f"(read at position {own - 1}, “feels”, which predicts it)"),
        ("its own position", own, f"(read at its own position, {own})"),
    ):
        if label is not None:
            page.get_by_label("A word shows", exact=True).select_option(label)
        page.mouse.move(5, 5)
        token.hover()
        page.wait_for_function(f"{STATE}.hoverQuery === {position}")
        page.wait_for_timeout(60)
        shown = page.evaluate("[...document.querySelector('#view').veenaView.map.values]")
        expected = decoded(view, position)[0, 3]
        torch.testing.assert_close(torch.tensor(shown), expected, rtol=1e-4, atol=1e-7)
        status = page.locator(".vv-status").inner_text()
        assert status.startswith("L0H3: “happy” gives the image") and status.endswith(where)
    page.mouse.move(5, 5)
    page.wait_for_function(f"{STATE}.hoverQuery === null")


def test_hovered_cell_shows_which_words_look_at_it_and_click_pins(page: Any) -> None:
    place = at_cell(page, 6, 4)
    page.mouse.move(**place)
    page.wait_for_function(f"{STATE}.hoverPatch !== null")
    assert "Words that look at cell 7, 5" in page.locator(".vv-readout").inner_text()
    page.mouse.click(**place)
    page.mouse.move(5, 5)
    page.wait_for_function(f"{STATE}.hoverPatch === null && {STATE}.patch !== null")
    assert "Words that look at cell 7, 5" in page.locator(".vv-readout").inner_text()
    page.locator(".vv-grid").focus()
    page.keyboard.press("Escape")
    page.wait_for_function(f"{STATE}.patch === null")


def test_keys_move_through_layers_heads_tokens_and_cells(page: Any) -> None:
    page.get_by_label("Layer", exact=True).select_option("2")
    page.locator(".vv-grid").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate(f"[{STATE}.layer, {STATE}.head]") == [3, 1]
    page.keyboard.press("k")
    page.keyboard.press("l")
    assert page.evaluate(f"[{STATE}.layer, {STATE}.head]") == [2, 2]
    page.keyboard.press("m")
    assert page.evaluate(f"{STATE}.head") == -1
    before = page.evaluate(f"{STATE}.query")
    page.locator('.vv-token[aria-selected="true"]').focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(f"{STATE}.query") == before + 1
    assert page.evaluate("Number(document.activeElement.dataset.at)") == before + 2  # the word that is predicted there
    page.locator(".vv-picture canvas").first.focus()
    page.keyboard.press("Enter")
    first = page.evaluate(f"{STATE}.patch")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(f"{STATE}.patch") == first + 1 + 8


def test_every_control_can_be_reached_and_shows_its_focus(page: Any) -> None:
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " const name = e === document.body ? 'BODY' : e.className || e.tagName;"
            " return [name, s.outlineStyle, parseFloat(s.outlineWidth)]; }"
        )
        if found[0] == "BODY":
            break
        reached.append(found)
    names = " ".join(str(r[0]) for r in reached)
    assert "vv-grid" in names and "vv-token" in names and names.count("CANVAS") >= 1 and "SELECT" in names
    assert all(style != "none" and width >= 2 for _, style, width in reached), reached


@pytest.mark.parametrize("mode", ["attention", "sinks", "difference", "lens", "push", "norms"])
def test_every_mode_draws_and_keeps_contrast(page: Any, mode: str) -> None:
    page.click(f'[data-mode="{mode}"]')
    page.wait_for_function(f"{STATE}.mode === '{mode}'")
    page.mouse.move(**at_cell(page, 3, 3))
    page.wait_for_timeout(60)
    assert page.evaluate(
        "() => { const v = document.querySelector('#view').veenaView; return v.map !== null && v.gridShape !== null; }"
    )
    colours = page.evaluate(
        "() => { const c = document.querySelector('.vv-grid'), d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data, s = new Set();"
        " for (let i = 0; i < d.length; i += 400) s.add(`${d[i]},${d[i + 1]},${d[i + 2]}`); return s.size; }"
    )
    assert colours > 4
    assert low_contrast(page, "#view") == []


def test_notebook_frame_draws_without_a_kernel(view: ExplorerView, tmp_path: Path, open_page: Any) -> None:
    (tmp_path / "cell.html").write_text(f"<!doctype html><body>{view._repr_html_()}</body>", encoding="utf-8")
    page = open_page((tmp_path / "cell.html").as_uri())
    page.frame_locator("iframe").locator(".vv-token").first.wait_for()


@pytest.mark.parametrize("width", [800, 1280])
def test_nothing_is_wider_than_the_window(view: ExplorerView, tmp_path: Path, open_page: Any, width: int) -> None:
    page = open_page(view.save(tmp_path / "view.html").as_uri(), width)
    page.wait_for_selector(".vv-token")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def shown_map(page: Any, **state: Any) -> torch.Tensor:
    """The map that the page draws in a state, over all positions; NaN where it draws nothing."""
    values = page.evaluate(
        "(state) => { const v = document.querySelector('#view').veenaView; Object.assign(v.state, state); v.update();"
        " return [...v.map.values].map((x) => (Number.isNaN(x) ? null : x)); }",
        state,
    )
    return torch.tensor([float("nan") if v is None else v for v in values])


def decoded(view: ExplorerView, query: int, run: int = 0, kind: str = "attention") -> torch.Tensor:
    """[layer head pos] of a token, as Python decodes it."""
    (bundle,) = [b for b in view.bundles if (b.key.query, b.key.run, b.key.kind) == (query, run, kind)]
    return bundle.maps.decode(view.inputs.image_mask[0])


def test_numbers_of_the_page_are_those_of_python(page: Any, view: ExplorerView) -> None:
    query, close = view.header["query"], {"rtol": 1e-4, "atol": 1e-7}
    first, second = decoded(view, query), decoded(view, query, run=1)
    for mode, expected in (
        ("attention", first),
        ("difference", first - second),
        ("push", decoded(view, query, 0, "push")),
    ):
        for layer, head in ((2, 5), (4, -1), (-1, 3), (-1, -1)):
            chosen = expected if layer < 0 else expected[layer : layer + 1]
            chosen = chosen if head < 0 else chosen[:, head : head + 1]
            shown = shown_map(page, mode=mode, layer=layer, head=head)
            torch.testing.assert_close(shown, chosen.mean((0, 1)), **close)
    torch.testing.assert_close(
        shown_map(page, mode="norms", layer=3), torch.from_numpy(view.arrays["norms"][3]).log10(), **close
    )
    lens = Coded(
        values=torch.from_numpy(view.arrays["lens_maps"]), scales=torch.from_numpy(view.arrays["lens_scales"])
    ).decode(view.inputs.image_mask[0])
    torch.testing.assert_close(shown_map(page, mode="lens", layer=6, word=1), lens[1, 6], **close)
    torch.testing.assert_close(shown_map(page, mode="lens", layer=-1, word=0), lens[0].mean(0), **close)


def test_sinks_have_no_colour_and_the_other_weights_sum_to_one(open_page: Any, tmp_path: Path) -> None:
    view = ExplorerView.from_cache(sinking_cache())
    page = open_page(view.save(tmp_path / "sinks.html").as_uri())
    page.wait_for_selector(".vv-token")
    query = view.header["query"]
    weights = decoded(view, query)[1]
    shown = shown_map(page, mode="sinks", layer=1, head=-1)
    assert shown.isnan().nonzero().flatten().tolist() == SINKS
    left = weights.clone()
    left[:, SINKS] = 0
    expected = (left / (1 - weights[:, SINKS].sum(-1, keepdim=True))).mean(0)
    torch.testing.assert_close(shown.nan_to_num(0.0), expected, rtol=1e-3, atol=1e-6)
    assert abs(float(shown.nansum()) - 1) < 0.02
    plain = shown_map(page, mode="sinks", layer=0, head=-1)  # a layer without sinks is as it was
    torch.testing.assert_close(plain, decoded(view, query)[0].mean(0), rtol=1e-4, atol=1e-7)


HOVERS = """async (what) => {
  const times = [], spent = async (act) => {
    const began = performance.now();
    act();
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
    times.push(performance.now() - began);
  };
  if (what === 'tokens') for (const chip of document.querySelectorAll('.vv-token')) {
    await spent(() => chip.dispatchEvent(new PointerEvent('pointerover', { bubbles: true })));
  } else {
    const canvas = document.querySelectorAll('.vv-picture canvas')[1], box = canvas.getBoundingClientRect();
    for (let i = 0; i < 30; i++) await spent(() => canvas.dispatchEvent(new PointerEvent('pointermove',
      { clientX: box.left + box.width * (0.02 + 0.03 * i), clientY: box.top + box.height * (0.9 - 0.02 * i) })));
  }
  return times.sort((a, b) => a - b);
}"""


def test_hover_over_2880_image_tokens_and_1024_heads_takes_less_than_100_ms(tmp_path: Path, open_page: Any) -> None:
    cache = large_cache()
    view = ExplorerView.from_cache(cache, pictures=[large_picture()], modes=["attention", "norms"])
    page = open_page(view.save(tmp_path / "large.html").as_uri(), offline=True)
    page.wait_for_selector(".vv-token")
    page.wait_for_timeout(500)
    for layer in (3, -1):  # one layer's heads, and the mean over all 1,024
        page.evaluate(f"document.querySelector('#view').veenaView.set({{layer: {layer}, head: -1}})")
        for what in ("tokens", "cells"):
            times = page.evaluate(HOVERS, what)
            late = times[int(0.95 * len(times))]
            assert late <= 100, f"{what}, layer {layer}: 95 % within {late:.0f} ms"


def test_page_that_was_cut_short_says_so(view: ExplorerView, tmp_path: Path, open_page: Any, watched: Any) -> None:
    watched.allowed = ("Compressed input was truncated", "Unexpected", "incorrect", "atob", "decode", "Junk")
    page = view.save(tmp_path / "view.html")
    text = page.read_text(encoding="utf-8")
    at = text.index('id="data">') + 10
    page.write_text(text[: at + 4000] + text[text.index("</script>", at) :], encoding="utf-8")
    opened = open_page(page.as_uri())
    opened.wait_for_selector("[role=alert]")
    assert "cannot be shown" in opened.locator("[role=alert]").inner_text()


def test_notebook_widget_draws_and_asks_the_kernel_for_what_it_lacks(open_page: Any, tmp_path: Path) -> None:
    """The module's anywidget face, with a model of the front end that hands messages to the real widget."""
    pytest.importorskip("anywidget")
    import base64

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    picture = bundled_pairs("test")[0][0].open()
    small = ExplorerView.from_run(model, (picture, QUESTION), modes=["attention", "norms"], max_bytes=1)
    widget, answers = small.widget(), []
    widget.send = lambda content, buffers=None: answers.append((content, buffers))

    def kernel(message: dict[str, Any]) -> list[Any]:
        widget._answer(widget, message, [])
        content, buffers = answers[-1]
        return [content, [base64.b64encode(b).decode() for b in buffers or []]]

    payload = base64.b64encode(widget.payload).decode()
    shell = tmp_path / "notebook.html"
    shell.write_text(
        f"""<!doctype html><meta charset="utf-8"><div id="cell"></div><script type="module">{script()}
        const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
        const heard = [];
        const front = {{
          get: () => bytes("{payload}"), set: (k, v) => {{ window.pinned = v; }}, save_changes: () => {{}},
          on: (name, act) => heard.push(act), off: () => {{}},
          send: async (message) => {{
            const [content, buffers] = await window.kernel(message);
            for (const act of heard) act(content, buffers.map(bytes));
          }},
        }};
        window.close_widget = render({{ model: front, el: document.getElementById("cell") }});
        </script>""",
        encoding="utf-8",
    )
    page = open_page("about:blank")
    page.expose_function("kernel", kernel)
    page.goto(shell.as_uri())
    page.wait_for_selector(".vv-token")
    state = "document.querySelector('.veena-view').veenaView"
    token = page.locator(".vv-token", has_text="feel").first
    token.click()
    position = int(token.get_attribute("data-at") or -1) - 1  # where it is predicted
    page.wait_for_function(f"{state}.store.get({{query: {position}}}).heads === 8")
    assert page.evaluate("window.pinned.query") == position and answers
    page.evaluate("document.addEventListener('keydown', (event) => { window.escaped = event.key; })")
    page.locator(".vv-grid").focus()
    page.keyboard.press("m")  # which would turn a notebook's cell into text
    page.click("[data-mode=norms]")
    assert page.evaluate("[window.pinned.mode, window.escaped]") == ["norms", None]
    page.evaluate("window.close_widget()")
    assert page.locator(".vv-token").count() == 0
