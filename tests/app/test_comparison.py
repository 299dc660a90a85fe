"""The page that shows several models' demos side by side, from made-up findings."""

import json
from dataclasses import replace

import pytest

from tests.app.test_demo import findings
from veena_lens.app.comparison import Comparison, run_demos, write_comparison


def test_page_has_a_column_for_each_model_and_leads_to_their_pages(tmp_path) -> None:
    first = findings(tmp_path / "one")
    second = replace(first, model="another", out=tmp_path / "another", named_right=2)
    comparison = Comparison((first, second), tmp_path)
    page = write_comparison(comparison).read_text(encoding="utf-8")
    assert page.count('<th scope="col">made-up</th>') == 2 and page.count('<th scope="col">another</th>') == 2
    assert '<a href="made-up/index.html">' in page and '<a href="another/index.html">' in page
    assert "1 of 2 test pictures" in page and "2 of 2 test pictures" in page
    assert set(json.loads((tmp_path / "numbers.json").read_text())) == {"made-up", "another"}
    assert str(comparison.page) in repr(comparison)


def test_models_must_be_named_once_each(tmp_path) -> None:
    for models in ([], ["tiny-llava-emotion", "tiny-llava-emotion"]):
        with pytest.raises(ValueError, match="once each"):
            run_demos(tmp_path, models)
