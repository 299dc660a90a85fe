"""The explorer in a real browser: everything that a visitor does, and what happens when it goes wrong."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.app.browser.conftest import low_contrast, start, stop
from veena_lens.app.view import save_cache
from veena_lens.checkpoints.files import bundled_pairs, bundled_pictures

VIEW = "document.querySelector('#look-view .veena-slot').veenaView"
# What tells one view from the next: the words of its strip and its images.
TELLING = (
    f"(() => {{ const v = {VIEW}; if (!v) return '';"
    " const words = v.header.tokens.map((t) => t.text ?? ''), pictures = v.header.panels.map((p) => p.source);"
    " return [...words, ...pictures].join('|'); })()"
)


def opened(open_page: Callable[..., Any], server: str, width: int = 1280) -> Any:
    """The page, after the sample's answer came."""
    page = open_page(server, width)
    page.wait_for_selector("#look-view .vv-answer")
    page.wait_for_function("!document.querySelector('#look-view .progress-text, #look-view .generating')")
    return page


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def token_of(page: Any) -> str:
    """What tells the view that is shown from others."""
    return page.evaluate(TELLING)


def ask(page: Any, question: str | None = None) -> str:
    """Ask and wait for the answer's view; gives the answer."""
    before = token_of(page)
    if question is not None:
        page.fill("#prompt textarea", question)
    page.click("#ask")
    page.wait_for_function(f"(before) => ![before, ''].includes({TELLING})", arg=before)
    return page.input_value("#answer textarea").strip()


def choose(page: Any, name: str, text: str) -> None:
    """Choose an entry of a dropdown."""
    page.click(f"#{name} input")
    page.get_by_role("option", name=text, exact=False).first.click()


def error_of(page: Any) -> str:
    """The message that the page shows."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    return toast.inner_text()


@pytest.fixture(scope="module")
def sad() -> Any:
    return next(p for p in bundled_pictures("test") if p.emotion == "sad")


def test_upload_ask_hover_and_click(open_page: Any, server: str, sad: Any) -> None:
    page = opened(open_page, server)
    page.set_input_files("#uploads input[type=file]", str(sad.path))
    page.wait_for_selector(f'#thumbs img[alt="{sad.path.name}"]')
    assert "sad" in ask(page)
    words = page.locator("#look-view .vv-answer")
    assert "".join(words.all_text_contents()).strip() == page.input_value("#answer textarea").strip()
    words.filter(has_text="sad").hover()
    page.wait_for_function(f"{VIEW}.state.hoverQuery !== null")
    assert "“sad” gives the image" in page.locator("#look-view .vv-status").inner_text()
    words.filter(has_text="sad").click()
    canvas = page.locator("#look-view .vv-picture canvas").first
    canvas.hover(position={"x": 90, "y": 120})
    page.wait_for_function(f"{VIEW}.patch !== null")
    assert "Words that look at cell" in page.locator("#look-view .vv-readout").inner_text()
    page.locator("#look-view .vv-grid").click(position={"x": 60, "y": 100})
    page.wait_for_function(f"{VIEW}.state.head >= 0")
    page.click("#look-code-box button")
    assert f"'{sad.path.name}'" in page.locator("#look-code").inner_text()


def test_answer_and_view_survive_other_tabs_and_reload_starts_afresh(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    first = ask(page, "describe the picture and the feelings of the person.")
    tab(page, "Pairs")
    tab(page, "Look")
    assert page.input_value("#answer textarea").strip() == first
    page.reload()
    page.wait_for_selector("#look-view .vv-answer")
    assert page.input_value("#prompt textarea") == "how does the person in the picture feel?"


def test_other_model_is_chosen_and_asked(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    choose(page, "model", "tiny-qwen2vl-emotion")
    assert ask(page) != ""
    assert page.evaluate(f"{VIEW}.header.title") == "tiny-qwen2vl-emotion"
    tab(page, "Steer")
    page.click("#extract")
    page.locator("#direction").get_by_text("on tiny-qwen2vl-emotion", exact=False).first.wait_for()
    tab(page, "Look")
    assert ask(page, "name the emotions of the person in the picture.") != ""
    page.click("#look-view [data-mode=push]")
    page.locator("#look-view .vv-answer").last.click()  # its push is computed now
    page.wait_for_function(f"{VIEW}.map !== null && {VIEW}.state.query !== {VIEW}.header.query")


def test_lens_reads_the_question_of_the_look_tab(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Lens")
    page.fill("#words textarea, #words input", "happy, sad")
    page.click("#lens-go")
    page.wait_for_selector("#lens-view .vv-token")
    assert "happy has the highest in the last layer" in (page.locator("#lens-figure img").get_attribute("alt") or "")
    assert page.locator("#lens-view .vv-modes button").all_inner_texts() == ["Logit lens", "Norms"]


def test_sweep_runs_and_a_cell_opens_its_head(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Patch")
    page.click("#sweep")
    page.get_by_text("8 of 8 layers done", exact=False).first.wait_for()
    assert page.locator("#cells [role=gridcell]").count() == 64
    cell = page.locator('#cells [role=gridcell][aria-label^="L3H5"]')
    cell.focus()
    page.keyboard.press("ArrowRight")
    assert "L3H6" in (page.evaluate("document.activeElement.getAttribute('aria-label')") or "")
    cell.click()
    page.wait_for_function(f"() => {{ const v = {VIEW}; return v && v.state.layer === 3 && v.state.head === 5; }}")
    assert page.get_by_role("tab", name="Look").get_attribute("aria-selected") == "true"
    assert page.locator("#look-view [data-mode=difference]").is_visible()


def test_sweep_too_large_offers_a_smaller_one_that_runs(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Patch")
    choose(page, "sites", "residual")
    choose(page, "where", "each")
    page.click("#sweep")
    status = page.locator("#sweep-status")
    status.get_by_text("Too large.").wait_for()
    assert re.search(r"would hold about [\d.]+ MB at once; the limit here is 3\.1 MB", status.inner_text())
    page.click("#smaller")
    page.get_by_text("of 8 layers done", exact=False).first.wait_for()
    page.click("#cancel")
    page.get_by_text("Cancelled; finished layers are kept.").wait_for()
    assert page.locator("#cells [role=gridcell]").count() > 0


def test_browser_closed_during_a_sweep_leaves_the_server_as_it_was(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    answer = ask(page, "name the emotions of the person in the picture.")
    other = opened(open_page, server)
    tab(other, "Patch")
    choose(other, "sites", "residual")
    choose(other, "where", "each")
    other.click("#sweep")
    other.click("#smaller")
    other.get_by_text("of 8 layers done", exact=False).first.wait_for()
    other.close()
    page.fill("#prompt textarea", "what is this?")
    assert ask(page, "what is this?") != ""
    assert ask(page, "name the emotions of the person in the picture.") == answer


def test_steering_turns_the_answer_and_its_circuit_loads_again(open_page: Any, server: str, tmp_path: Path) -> None:
    page = opened(open_page, server)
    tab(page, "Steer")
    page.click("#steer")
    page.locator("#steer-of").get_by_text("Shown:").wait_for()  # and not the example
    after = page.locator("#sides section").nth(1)
    assert "hit" in after.inner_text() and "miss" in page.locator("#sides section").nth(0).inner_text()
    said = after.locator("p").first.inner_text()
    page.click("#steer-export")
    page.wait_for_selector("#steer-files a")
    with page.expect_download() as download:
        page.locator('#steer-files a[href*="circuit"]').first.click()
    path = tmp_path / "circuit.safetensors"
    download.value.save_as(path)
    page.set_input_files("#circuit input[type=file]", str(path))
    page.locator("#direction").get_by_text("Circuit", exact=False).first.wait_for()
    page.click("#steer")
    page.wait_for_timeout(300)
    page.locator("#steer-code-box button").first.click()
    page.locator("#steer-code").get_by_text("Circuit", exact=False).first.wait_for()
    assert after.locator("p").first.inner_text() == said


def test_own_pairs_make_a_direction_and_wrong_ones_are_told(open_page: Any, server: str, tmp_path: Path) -> None:
    pairs = [p for p in bundled_pairs("development") if p[0].emotion == "sad"][:3]
    page = opened(open_page, server)
    tab(page, "Steer")
    page.click("#own button")
    page.set_input_files("#own-shown input[type=file]", [str(p[0].path) for p in pairs])
    page.set_input_files("#own-twins input[type=file]", [str(p[1].path) for p in pairs[:2]])
    page.fill("#own-word input, #own-word textarea", "sad")
    page.wait_for_timeout(500)
    page.click("#own-use")
    assert "Got 3 images with the emotion and 2 without it; each needs its twin" in error_of(page)
    page.locator(".toast-close").first.click()
    page.locator("#own-twins button[aria-label*=emove]").first.wait_for()
    page.locator("#own-twins button[aria-label=Clear]").click()
    page.set_input_files("#own-twins input[type=file]", [str(p[1].path) for p in pairs])
    page.wait_for_timeout(500)
    page.click("#own-use")
    page.locator("#own-status").get_by_text("Your pairs: 3 pairs of sad.").wait_for()
    assert page.locator("#own-thumbs img").count() == 6
    page.click("#extract")
    page.locator("#direction").get_by_text(
        "from 3 of your 3 pairs that the model answers correctly", exact=False
    ).wait_for()
    page.click("#own-back")
    page.locator("#own-status").get_by_text("Back to the sample faces.").wait_for()
    page.click("#extract")
    page.locator("#direction").get_by_text("from the 8 (of 8) pairs", exact=False).wait_for()


def test_neurons_and_pairs(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Neurons")
    page.click("#neurons-go")
    page.wait_for_selector("#drivers img")
    first = page.input_value("#which textarea, #which input")
    page.locator('#neurons [role=gridcell][data-row="2"][data-col="1"]').click()
    page.wait_for_function("(old) => document.querySelector('#which textarea, #which input').value !== old", arg=first)
    tab(page, "Pairs")
    page.click("#pairs-go")
    page.wait_for_selector("#faces img >> nth=11")
    page.click("#use-pair")
    page.wait_for_function("document.querySelector('#tab-patch-button, [role=tab][aria-selected=true]') !== null")
    page.wait_for_selector("#sweep:visible")


def test_exports_are_files_that_hold_what_was_shown(open_page: Any, server: str, tmp_path: Path) -> None:
    page = opened(open_page, server)
    page.click("#look-export")
    page.wait_for_selector("#look-files a")
    names = " ".join(page.locator("#look-files").all_inner_texts())
    assert all(part in names for part in ("view", "cache", "attention"))
    for name, check in (("view", "html"), ("attention", "csv")):
        with page.expect_download() as download:
            page.locator(
                f'#look-files a[download$="{name}.{check}"], #look-files a[href$="{name}.{check}"]'
            ).first.click()
        path = tmp_path / f"{name}.{check}"
        download.value.save_as(path)
        assert path.stat().st_size > 1_000
    with (tmp_path / "attention.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file))[-1] == "value"
    page = open_page((tmp_path / "view.html").as_uri())
    page.wait_for_selector(".vv-token")


def test_two_visitors_at_once_get_their_own_answers(open_page: Any, server: str, sad: Any) -> None:
    pages = [opened(open_page, server) for _ in range(2)]
    pages[1].set_input_files("#uploads input[type=file]", str(sad.path))
    pages[1].wait_for_selector(f'#thumbs img[alt="{sad.path.name}"]')
    for page in pages:
        page.fill("#prompt textarea", "describe the picture and the feelings of the person.")
    before = [token_of(page) for page in pages]
    for page in pages:
        page.click("#ask")
    for page, old in zip(pages, before, strict=True):
        for _ in range(100):
            if token_of(page) not in ("", old):
                break
            page.wait_for_timeout(100)
    answers = [page.input_value("#answer textarea") for page in pages]
    shown = ["".join(page.locator("#look-view .vv-answer").all_text_contents()) for page in pages]
    assert [a.strip() for a in answers] == [s.strip() for s in shown] and answers[0] != answers[1]
    sources = [page.evaluate(f"{VIEW}.header.panels[0].source") for page in pages]
    assert sources[0] != sources[1]


@pytest.mark.parametrize("kind", ["text", "cut", "pixels", "bytes"])
def test_wrong_picture_is_told_and_the_page_goes_on(
    open_page: Any, server: str, tmp_path: Path, sad: Any, kind: str, watched: Any
) -> None:
    watched.allowed = ("413", "400", "exceeds", "Failed to load resource")
    path = tmp_path / "face.png"
    if kind == "text":
        path.write_text("no picture")
    elif kind == "cut":
        path.write_bytes(sad.path.read_bytes()[:900])
    elif kind == "pixels":
        Image.new("RGB", (1000, 800)).save(path)
    else:
        path.write_bytes(b"0" * 1_200_000)
    page = opened(open_page, server)
    page.set_input_files("#uploads input[type=file]", str(path))
    told = error_of(page)
    wanted = {
        "text": "face.png cannot be read as a",
        "cut": "face.png cannot be read",
        "pixels": "face.png has 800,000 pixels; the limit here is 500,000",
        "bytes": "size",
    }[kind]
    assert wanted in told and "Traceback" not in told
    assert page.locator("#look-view .vv-answer").count() > 0  # what was there is still there


def test_overlong_prompt_is_told(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    page.fill("#prompt textarea", "why " * 1500)
    page.click("#ask")
    assert "context is 1024" in error_of(page)
    assert page.locator("#look-view .vv-answer").count() > 0


def test_wrong_cache_and_cut_circuit_are_told(open_page: Any, server: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 500)
    page = opened(open_page, server)
    page.click("#more button")
    page.set_input_files("#cache input[type=file]", str(broken))
    assert "broken.safetensors (500 bytes) cannot be read as an activation cache" in error_of(page)
    page = opened(open_page, server)
    tab(page, "Steer")
    page.set_input_files("#circuit input[type=file]", str(broken))
    assert "broken.safetensors (500 bytes) cannot be read as a circuit" in error_of(page)


@pytest.mark.parametrize("width", [800, 1280])
def test_page_fits_its_window_and_keeps_contrast(open_page: Any, server: str, width: int) -> None:
    page = opened(open_page, server, width)
    for name in ("Look", "Lens", "Patch", "Steer", "Neurons", "Pairs"):
        tab(page, name)
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert low_contrast(page, ".gradio-container") == [], name


def test_what_has_the_keyboard_is_seen(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e), b = e.getBoundingClientRect();"
            " return [e.id || e.className || e.tagName, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2,"
            " b.width * b.height > 0]; }"
        )
        if found[0] == "BODY":
            continue
        reached.add(str(found[0]).split(" ")[0])
        assert found[1] or not found[2], f"{found[0]} has the keyboard and does not show it"
    assert {"ask", "stop"} <= reached and any("vv-" in name for name in reached)


def test_cache_opens_without_a_model(open_page: Any, tmp_path: Path) -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    picture = next(p for p in bundled_pictures("test") if p.emotion == "happy").open()
    inputs = model.prepare(text="how?", images=picture, answer=" happy")
    names = [n for n in model.hook_dict if n.startswith("blocks.") and n.endswith("hook_pattern")]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    path = save_cache(cache, tmp_path / "c.safetensors", pictures=[picture], tokenizer=model.tokenizer)
    process, url = start("--cache", str(path))
    try:
        page = open_page(url)
        page.wait_for_selector("#look-view .vv-token")
        assert page.locator("#look-view .vv-answer").inner_text().strip() == "happy"
        assert page.input_value("#answer textarea") == "(a cache: c.safetensors)"
        choose(page, "model", "tiny-qwen2vl-emotion")
        page.click("#more button")
        page.check("#cache-lens input")
        page.set_input_files("#cache input[type=file]", str(path))
        assert "This cache is of another model than tiny-qwen2vl-emotion" in error_of(page)
        assert page.locator("#look-view .vv-answer").count() == 1  # what was there is still there
        page.close()
    finally:
        stop(process)


# --- what is said, and of what -----------------------------------------------------------------------------


def notice(page: Any, name: str) -> str:
    """The notice beside a tab's controls; "" where there is none."""
    found = page.locator(f"#{name}-notice .veena-notice")
    return found.inner_text().removesuffix("Close").strip() if found.is_visible() else ""


def test_failed_upload_leaves_a_notice_and_marks_the_old_result(
    open_page: Any, server: str, tmp_path: Path, sad: Any
) -> None:
    path = tmp_path / "face.png"
    path.write_text("no picture")
    page = opened(open_page, server)
    assert "Shown: tiny-llava-emotion" in page.locator("#look-of").inner_text()
    page.set_input_files("#uploads input[type=file]", str(path))
    page.locator("#look-of .veena-old").wait_for()
    page.locator("#thumbs img").wait_for(state="detached")
    page.locator("#look-notice .veena-notice").wait_for()
    assert "face.png cannot be read as an image" in notice(page, "look")
    page.wait_for_timeout(11_000)  # longer than the message in the corner stays
    assert "face.png cannot be read as an image" in notice(page, "look")
    page.locator("#uploads button[aria-label=Clear], #uploads button[aria-label*=emove]").first.click()
    page.set_input_files("#uploads input[type=file]", str(sad.path))
    page.wait_for_selector(f'#thumbs img[alt="{sad.path.name}"]')
    page.locator("#look-notice .veena-notice").wait_for(state="hidden")
    assert "sad" in ask(page)
    page.locator("#look-of .veena-old").wait_for(state="detached")


def test_upload_that_the_browser_refuses_leaves_a_notice(
    open_page: Any, server: str, tmp_path: Path, watched: Any
) -> None:
    watched.allowed = ("413", "exceeds", "Failed to load resource")
    path = tmp_path / "face.png"
    path.write_bytes(b"0" * 1_200_000)
    page = opened(open_page, server)
    page.set_input_files("#uploads input[type=file]", str(path))
    page.locator("#look-notice .veena-notice").wait_for()
    assert "size" in notice(page, "look") and page.locator("#look-of .veena-old").is_visible()


def test_choices_that_differ_from_the_result_mark_it(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    page.fill("#prompt textarea", "what is this?")
    page.locator("#look-of .veena-old").wait_for()
    page.fill("#prompt textarea", "how does the person in the picture feel?")
    page.locator("#look-of .veena-old").wait_for(state="detached")
    choose(page, "model", "tiny-qwen2vl-emotion")
    page.locator("#look-of .veena-old").wait_for()
    tab(page, "Lens")
    page.click("#lens-go")
    page.locator("#lens-of").get_by_text("Shown: tiny-llava-emotion").wait_for()
    tab(page, "Look")
    ask(page)
    tab(page, "Lens")  # its run is another one now
    page.locator("#lens-of .veena-old").wait_for()


def test_word_of_several_tokens_offers_them(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Lens")
    page.fill("#words textarea, #words input", "happy, bicycle")
    page.click("#lens-go")
    page.locator("#lens-notice .veena-notice").wait_for()
    assert "“bicycle” is 5 tokens to this model" in notice(page, "lens")
    page.locator("#lens-offers label").first.click()
    page.wait_for_function("/^happy, #\\d+$/.test(document.querySelector('#words textarea, #words input').value)")
    page.click("#lens-go")
    page.wait_for_selector("#lens-view .vv-token")
    assert notice(page, "lens") == ""


def test_every_tab_shows_an_example_and_says_what_it_answers(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    assert "drawn faces only" in page.locator("#model").inner_text()
    shown = {"Lens": "#lens-figure img", "Patch": "#cells [role=gridcell]", "Steer": "#sides section"}
    shown |= {"Neurons": "#neurons [role=gridcell]", "Pairs": "#faces img"}
    for name, found in shown.items():
        tab(page, name)
        page.locator(found).first.wait_for()
        assert "Example" in page.locator(f"#{name.lower()}-of").inner_text()
        assert "?" in page.locator(".veena-asks p:visible").inner_text()


def test_cell_that_opens_the_look_tab_fills_its_choices(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Patch")
    page.click("#sweep")
    page.get_by_text("8 of 8 layers done", exact=False).first.wait_for()
    page.locator('#cells [role=gridcell][aria-label^="L3H5"]').click()
    page.wait_for_function(f"() => {{ const v = {VIEW}; return v && v.state.layer === 3 && v.state.head === 5; }}")
    page.wait_for_function(
        "document.querySelector('#prompt textarea').value === 'name the emotions of the person in the picture.'"
    )
    page.wait_for_timeout(600)
    assert "as patched" in page.locator("#look-of").inner_text()
    assert page.locator("#look-of .veena-old").count() == 0 and page.locator("#thumbs img").count() == 1
    page.click("#more button")
    assert "neutral" in page.locator("#second input").input_value()


def test_pinned_head_is_what_the_page_exports(open_page: Any, server: str, tmp_path: Path) -> None:
    page = opened(open_page, server)
    page.locator("#look-view").get_by_label("Layer", exact=True).select_option("2")
    page.locator("#look-view").get_by_label("Head", exact=True).select_option("5")
    page.wait_for_timeout(800)
    page.click("#look-export")
    page.wait_for_selector("#look-files a")
    with page.expect_download() as download:
        page.locator('#look-files a[download$="view.html"], #look-files a[href$="view.html"]').first.click()
    path = tmp_path / "view.html"
    download.value.save_as(path)
    page = open_page(path.as_uri())
    page.wait_for_selector(".vv-token")
    state = "document.querySelector('#view').veenaView.state"
    assert page.evaluate(f"[{state}.layer, {state}.head]") == [2, 5]
    about = page.locator(".vv-about").inner_text()
    assert "model: tiny-llava-emotion" in about and "question: how does the person" in about and "veena_lens" in about


def test_sweep_over_positions_lies_on_the_image(open_page: Any, server: str) -> None:
    page = opened(open_page, server)
    tab(page, "Patch")
    choose(page, "sites", "residual")
    choose(page, "where", "each")
    page.click("#sweep")
    page.click("#smaller")
    page.get_by_text("8 of 8 layers done", exact=False).first.wait_for(timeout=60_000)
    page.wait_for_selector("#patch-view .vv-token", timeout=60_000)
    assert page.locator("#patch-view .vv-modes button").all_inner_texts() == ["Effects of patching"]
    assert page.locator("#patch-view .vv-picture canvas").count() == 1


def test_two_prompts_and_two_sets_steer(open_page: Any, server: str) -> None:
    pairs = [p for p in bundled_pairs("development") if p[0].emotion == "sad"]
    page = opened(open_page, server)
    tab(page, "Steer")
    assert page.locator("#steer-thumbs img").count() == 1
    page.click("#own button")
    page.set_input_files("#own-shown input[type=file]", [str(p[0].path) for p in pairs[:3]])
    page.set_input_files("#own-twins input[type=file]", [str(p[1].path) for p in pairs[:2]])
    page.fill("#own-word input, #own-word textarea", "crying")
    page.wait_for_timeout(500)
    page.click("#own-sets")
    page.locator("#own-status").get_by_text("3 images against 2").wait_for()
    page.click("#steer")
    page.locator("#steer-of").get_by_text("Shown:").wait_for()
    assert "sad" in page.locator("#sides section").nth(1).inner_text()
    page.fill("#own-first textarea, #own-first input", "a happy person")
    page.click("#own-prompts")
    page.locator("#steer-own-notice .veena-notice").wait_for()
    assert "Write two different prompts" in notice(page, "steer-own")
    tab(page, "Neurons")
    choose(page, "neuron-emotion", "latest")
    page.click("#neurons-go")
    page.locator("#neurons-of").get_by_text("crying").wait_for()
