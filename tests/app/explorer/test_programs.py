"""Programs: what is shown is the call that ran, with everything that it needs and nothing that is this server's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.app.explorer.conftest import NAME
from veena_lens.app.explorer import neurons, patch, pictures
from veena_lens.app.explorer.patch import patched_effects, size
from veena_lens.app.explorer.pictures import open_sample, sample, samples
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.emotion import sample_hit


def test_program_names_what_it_was_given_and_runs(run_code: Any) -> None:
    face = open_sample(next(iter(samples()))).made
    text = Made("the person feels happy.", repr("the person feels happy."))
    hit = make("hit", sample_hit, text, "happy")
    both = make("width, height", getattr, face, "size")
    width, height = both.parts()
    code = program(hit, Made(width.value, "width", face.lines, (*face.functions,)), then=["print(hit)"])
    assert "from veena_lens.emotion import sample_hit" in code and "def sample(file: str)" in code
    assert (width.value, height.value) == face.value.size and width.expression == "width"
    assert run_code(code)["hit"] == hit.value == 1.0


def test_server_settings_change_the_call_but_are_not_shown() -> None:
    shown = make("bytes", size, n=2**20, hidden={})
    hidden = make("bytes", size, hidden={"n": 2**20})
    assert shown.value == hidden.value == "1.0 MB"
    assert shown.lines == ("bytes = size(n=1048576)",) and hidden.lines == ("bytes = size()",)


def test_sources_come_after_what_they_need_and_imports_are_public() -> None:
    calls = [Made(None, "x", functions=(patched_effects, neurons.exciting, sample))]
    code = program(*calls)
    assert code.index("def single_token") < code.index("def patched_effects")
    assert code.index("def marked") < code.index("def exciting") and code.count("def sample(") == 1
    for line in ("from veena_lens import HookedVLM", "from veena_lens.sweeps import patch_sweep", "import torch"):
        assert line in code
    assert "veena_lens.app.explorer" not in code
    compile(code, "<shown>", "exec")


def test_arguments_are_spelled_as_given(face: Any) -> None:
    class Fake:
        pass

    def use(model: Any, images: list, words: tuple, about: dict) -> int:
        return len(images) + len(words) + len(about)

    model = model_of(Fake(), NAME)
    made = make("n", use, model, [face.made, "b.png"], ("happy", "sad"), {"x": face.made})
    assert made.value == 5 and made.lines[0] == f"model = HookedVLM.from_pretrained({NAME!r})"
    opened = face.made.expression
    assert all(text in made.lines[1] for text in (f"[{opened}, 'b.png']", "('happy', 'sad')", f"{{'x': {opened}}}"))
    assert made.functions[-1] is use and pictures.sample in made.functions


@pytest.mark.parametrize("then", [['plots.save(result.plot(), "a.png")'], []])
def test_plots_are_imported_where_they_are_used(then: list[str]) -> None:
    code = program(Made(None, "x", functions=(patch.size,)), then=then)
    assert ("from veena_lens import plots" in code) == bool(then)
