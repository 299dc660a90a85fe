"""The page that shows several models' demos side by side, from made-up findings."""

import json
from dataclasses import replace

import pytest

from tests.app.test_demo import findings
from veena_lens.app import demo
from veena_lens.app.demo import run_demos
from veena_lens.app.demo_page import write_comparison
from veena_lens.app.demo_results import Comparison


def test_page_has_a_column_for_each_model_and_leads_to_their_pages(tmp_path) -> None:
    first = findings(tmp_path / "one")
    second = replace(first, model="another", out=tmp_path / "another", named_right=2)
    comparison = Comparison((first, second), tmp_path)
    page = write_comparison(comparison).read_text(encoding="utf-8")
    assert page.count('<th scope="col">made-up</th>') == 2 and page.count('<th scope="col">another</th>') == 2
    assert '<a href="made-up/index.html">' in page and '<a href="another/index.html">' in page
    assert "<td>1 of 2</td><td>2 of 2</td>" in page and page.count("<iframe") == 1
    assert repr(comparison).splitlines()[-1] == f"both side by side: {comparison.page}"


def test_models_must_be_named_once_each(tmp_path) -> None:
    for models in ([], ["tiny-llava-emotion", "tiny-llava-emotion"]):
        with pytest.raises(ValueError, match="each of them once"):
            run_demos(tmp_path, models)


def test_every_model_writes_its_page_and_all_their_numbers_stand_together(tmp_path, monkeypatch) -> None:
    def run(out, model, progress):
        (out).mkdir(parents=True)
        return replace(findings(out), model=model)

    monkeypatch.setattr(demo, "run_demo", run)
    comparison = demo.run_demos(tmp_path, ["somewhere/one", "two"], progress=False)
    assert comparison.page.is_file() and [result.out.name for result in comparison.results] == ["one", "two"]
    assert set(json.loads((tmp_path / "numbers.json").read_text())) == {"one", "two"}
