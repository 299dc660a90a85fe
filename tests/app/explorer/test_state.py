"""Sessions do not mix, old ones go, and no failure leaves anything on a model."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from tests.app.explorer.conftest import NAME, QUESTION
from veena_lens.app.explorer import look
from veena_lens.app.explorer.state import Explorer, Limits
from veena_lens.interventions import Ablate


def test_failure_inside_using_leaves_the_model_clean(explorer: Explorer) -> None:
    cut = Ablate(name="blocks.0.hook_attn_out", positions="all", value="zero")
    with pytest.raises(RuntimeError, match="mid-way"), explorer.using(NAME) as model:
        model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: tensor * 0)
        model.intervene([cut]).__enter__()  # as a handler that was stopped would leave it
        assert not model.is_untouched
        raise RuntimeError("mid-way")
    with explorer.using(NAME) as model:
        assert model.is_untouched


def test_model_serves_one_thread_at_a_time(explorer: Explorer) -> None:
    inside, most = [0], [0]

    def use() -> None:
        for _ in range(5):
            with explorer.using(NAME) as model:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                model(torch.tensor([[1, 5, 6]]))
                inside[0] -= 1

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


def test_unknown_model_is_refused_by_name(explorer: Explorer) -> None:
    with (
        pytest.raises(ValueError, match="No model '/etc/passwd' here; there are: tiny-llava-emotion"),
        explorer.using("/etc/passwd"),
    ):
        pass


def test_two_tabs_see_their_own_results_only(explorer: Explorer, face: Any) -> None:
    first, second = explorer.session("first"), explorer.session("second")
    for _ in look.ask(explorer, first, NAME, [face], QUESTION, 8):
        pass
    assert "asked" in first.kept and "asked" not in second.kept
    with pytest.raises(ValueError, match="Ask something first"):
        look.look(explorer, second)


def test_replaced_view_and_closed_tab_have_no_address(explorer: Explorer, face: Any) -> None:
    session = explorer.session("a tab")
    for _ in look.ask(explorer, session, NAME, [face], QUESTION, 4):
        pass
    view, _ = look.look(explorer, session)
    old = explorer.show(session, "look", view)
    new = explorer.show(session, "look", view)
    assert explorer.view(old) is None and explorer.view(new) is view and len(new) >= 24
    assert explorer.maps(old, {"query": 3}) is None and explorer.maps(new, {"query": 3})
    folder = session.folder
    explorer.forget("a tab")
    assert explorer.view(new) is None and not folder.exists() and not session.kept


def test_session_unused_for_longest_goes_first(explorer: Explorer) -> None:
    keys = ["a", "b", "c"]
    for key in keys:
        explorer.session(key).kept["x"] = key
    explorer.session("a")
    explorer.session("d")
    assert explorer.n_sessions == 3 and explorer.session("a").kept == {"x": "a"}
    assert explorer.session("b").kept == {}  # made anew


def test_model_that_is_no_longer_kept_takes_its_views_along(face: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veena_lens.app.explorer.state.MOST_MODELS", 1)
    explorer = Explorer([NAME, "tiny-qwen2vl-emotion"])
    session = explorer.session("a tab")
    for _ in look.ask(explorer, session, NAME, [face], QUESTION, 2):
        pass
    token = explorer.show(session, "look", look.look(explorer, session)[0])
    with explorer.using("tiny-qwen2vl-emotion"):
        pass
    assert explorer.view(token) is None and "look" not in session.kept and "asked" in session.kept
    assert list(explorer._models) == ["tiny-qwen2vl-emotion"]
    assert look.look(explorer, session)[0].title == NAME  # asked again, it is loaded again


def test_limit_that_allows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="pixels=0 must be at least 1"):
        Limits(pixels=0)


def requests(explorer: Explorer, face: Any, n: int) -> list[int]:
    """Tensors that the collector knows after each quarter of `n` requests of two tabs."""
    import gc

    counts = []
    for i in range(n):
        session = explorer.session(f"tab {i % 2}")
        for _ in look.ask(explorer, session, NAME, [face], QUESTION, 3):
            pass
        view, _ = look.look(explorer, session)
        explorer.show(session, "look", view)
        explorer.maps(session.tokens["look"], {"query": 3})
        if (i + 1) % (n // 4) == 0:
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    return counts


def test_memory_does_not_grow_with_requests(explorer: Explorer, face: Any) -> None:
    counts = requests(explorer, face, 12)
    assert counts[-1] == counts[1] and len(explorer._views) == 2


@pytest.mark.slow
def test_memory_does_not_grow_over_two_hundred_requests(explorer: Explorer, face: Any) -> None:
    import resource

    requests(explorer, face, 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = requests(explorer, face, 200)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert counts[-1] == counts[0] and grown < 40 * 1024


def test_visitor_who_asks_while_another_steers_gets_the_plain_answer(explorer: Explorer, face: Any) -> None:
    session = explorer.session("asking")
    plain = list(look.ask(explorer, session, NAME, [face], QUESTION, 4))
    cut = Ablate(name="blocks.0.hook_attn_out", positions="all", value="zero")
    steps, inside, said = look.ask(explorer, session, NAME, [face], QUESTION, 4), threading.Event(), []

    def steer() -> None:
        with explorer.using(NAME) as model, model.intervene([cut]):
            inside.set()
            time.sleep(0.3)

    for _ in plain:  # each step in a thread of its own, as the server takes them
        inside.clear()
        other = threading.Thread(target=steer)
        other.start()
        assert inside.wait(60)
        step = threading.Thread(target=lambda: said.append(next(steps)))
        step.start()
        step.join()
        other.join()
    assert said == plain


def test_folder_lies_where_gradio_is_asked_to_keep_files(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "kept"))
    explorer = Explorer([NAME])
    assert explorer.folder.parent == tmp_path / "kept" and explorer.folder.stat().st_mode & 0o777 == 0o700
    session = explorer.session("a tab")
    explorer.close()
    assert not explorer.folder.exists() and explorer.n_sessions == 0 and not session.folder.exists()
    explorer.open()  # as a server that starts again
    assert explorer.session("a tab").folder.is_dir()
