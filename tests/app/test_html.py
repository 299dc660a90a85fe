"""The HTML page: escaped, self-contained, with a text for every image."""

from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from veena_lens import plots
from veena_lens.app.html import Report, Thumbnail


class Page(HTMLParser):
    """Checks nesting as it reads and keeps every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def report() -> Report:
    face = Thumbnail(Image.new("RGB", (8, 8), "red"), alt='a "red" square', caption="red <b>")
    page = Report("Faces & <script>", lead="What <i>was</i> run.")
    page.section("One", "a < b").section("One", "again")
    page.table(["face", "truth", "hit", "p"], [[face, "sad & low", "hit", 0.5]], caption="t", tones={"hit": "good"})
    page.figure(plots.heatmap(torch.eye(2)), alt="a diagonal", caption="An <em>eye</em>")
    page.figure(plots.curves(torch.rand(3)), alt="a curve", format="svg")
    return page.images([face, face], caption="two").code("x = '<tag>'")


def test_page_is_well_formed_and_every_text_is_escaped() -> None:
    text = report().html()
    page = Page(text)
    assert not page.all("script") and not page.all("i") and not page.all("em") and not page.all("b")
    for escaped in ("Faces &amp; &lt;script&gt;", "a &lt; b", "sad &amp; low", "&lt;tag&gt;", "red &lt;b&gt;"):
        assert escaped in text


def test_page_loads_nothing_and_says_so_to_the_browser() -> None:
    text = report().html()
    page = Page(text)
    assert "default-src 'none'" in text and not page.all("link")
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    assert {str(image["src"]).split(";")[0] for image in page.all("img")} == {"data:image/png", "data:image/svg+xml"}


def test_every_image_has_an_alt_text() -> None:
    assert all(image["alt"] for image in Page(report().html()).all("img"))
    with pytest.raises(ValueError, match="needs an alt text"):
        Report("x").figure(plots.curves(torch.rand(3)), alt=" ")


def test_links_lead_to_sections_and_names_differ() -> None:
    page = Page(report().html())
    names = [heading["id"] for heading in page.all("h2")]
    assert names == ["one", "one-2"]
    assert [link["href"] for link in page.all("a")] == ["#one", "#one-2"]


def test_cell_of_a_named_tone_gets_it() -> None:
    assert '<td class="good">hit</td>' in report().html() and '<td class="number">0.5</td>' in report().html()


def test_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Row 1 has 1 cells; the table has 2 columns"):
        Report("x").table(["a", "b"], [["1", "2"], ["1"]])


def test_page_is_written_with_both_colour_schemes(tmp_path) -> None:
    text = report().save(tmp_path / "new" / "index.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_folded_sections_open_on_paper_and_views_sit_in_frames() -> None:
    page = Report("x")
    with page.folded("A <b>", "first"), page.side_by_side():
        page.points("one & two").view("<p>'a' & \"b\"</p>", "a view", height=300)
    text = page.html()
    read = Page(text)
    assert [tag for tag, _ in read.seen if tag in ("details", "summary", "h2", "li", "iframe")] == [
        "details", "summary", "h2", "li", "iframe",
    ]  # fmt: skip
    assert read.all("iframe")[0]["srcdoc"] == "<p>'a' & \"b\"</p>" and "<li>one &amp; two</li>" in text
    assert "@media print" in text and "details-content" in text and "script-src 'unsafe-inline'" in text
    assert "script-src" not in Report("x").html()


def test_a_column_of_numbers_stands_to_the_right_with_its_heading() -> None:
    text = Report("x").table(["name", "n", "share, %"], [["a", 3, "95.5"], ["b", None, ""]]).html()
    assert '<th scope="col">name</th><th scope="col" class="number">n</th>' in text
    assert '<th scope="col" class="number">share, %</th>' in text and '<td class="number">95.5</td>' in text
