"""A tab says from which choices its result was made, keeps what went wrong, and offers the tokens of a word."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import gradio as gr
import pytest

from tests.app.explorer.conftest import NAME
from veena_lens.app.explorer.state import Explorer, Session, report_errors
from veena_lens.app.explorer.status import Status
from veena_lens.app.explorer.words import SeveralTokens, named, note_of, single_token


@pytest.fixture
def status(explorer: Explorer) -> Status:
    async def made() -> Status:  # outside of a loop Gradio makes some that nobody closes
        with gr.Blocks():
            status = Status(explorer, "look", also=lambda s: s.kept.get("asked"))
            status.place_notice()
            status.place_origin()
        return status

    return asyncio.run(made())


def is_old(status: Status, session: Session) -> bool:
    return "veena-old" in status.line(session)


def test_result_is_old_once_a_choice_differs_and_new_again_when_it_is_taken_back(
    status: Status, session: Session
) -> None:
    status.begins(session)
    status.shows(session, ("a", [], 1.0), "model a")
    assert not is_old(status, session) and "Shown: model a." in status.line(session)
    session.chosen["look"] = ("b", None, 1)
    assert is_old(status, session) and "below is still the earlier result, model a" in status.line(session)
    session.chosen["look"] = ("a", None, 1)
    assert not is_old(status, session)
    session.kept["asked"] = "another run, in another tab"
    assert is_old(status, session)


def test_choice_that_changed_while_the_result_was_made_counts(status: Status, session: Session) -> None:
    status.begins(session)
    session.chosen["look"] = ("b",)
    status.shows(session, ("a",), "model a")
    assert is_old(status, session)


def test_failure_is_kept_until_the_next_success_and_marks_the_result(status: Status, session: Session) -> None:
    @report_errors
    def handler(fails: bool, request: gr.Request) -> str:
        if fails:
            raise ValueError("This cannot be.")
        return "done"

    request: Any = gr.Request(session_hash=session.key)
    run = status.recorded(handler)
    status.shows(session, ("a",), "model a")
    numbers = []
    for _ in range(2):
        with pytest.raises(gr.Error):
            run(True, request)
        value = json.loads(status.notice_value(session))
        assert value["text"] == "This cannot be."
        numbers.append(value["n"])
    assert numbers[0] != numbers[1]  # announced again
    assert is_old(status, session) and "What was tried last failed" in status.line(session)
    assert run(False, request) == "done" and json.loads(status.notice_value(session))["text"] == ""
    with pytest.raises(gr.Error):
        status.recorded(handler, keeps=True)(True, request)


def test_text_of_a_line_cannot_carry_markup(status: Status, session: Session) -> None:
    status.shows(session, ("a",), "<script>")
    assert "<script>" not in status.line(session)


def test_word_of_several_tokens_is_refused_with_its_tokens(
    explorer: Explorer, session: Session, status: Status
) -> None:
    with explorer.using(NAME) as model:
        assert single_token(model, " happy ") == model.to_single_token(" happy")
        assert single_token(model, "#7") == 7 and named(model, "#7").startswith("#7 “")
        with pytest.raises(SeveralTokens, match=r"“bicycle” is 5 tokens to this model: “ b” \(#\d+\), “ic”") as told:
            single_token(model, "bicycle")
        with pytest.raises(ValueError, match="There is no token #99999999"):
            single_token(model, "#99999999")
        with pytest.raises(ValueError, match="Name two words"):
            single_token(model, " ")
        assert note_of(model, "happy") == "" and "is 5 tokens to this model" in note_of(model, "bicycle")
        texts = [model.tokenizer.decode([token]) for token, _ in told.value.pieces]
    assert "".join(texts) == " bicycle"

    @report_errors
    def read(request: gr.Request) -> None:
        raise told.value

    with pytest.raises(gr.Error):
        status.recorded(read)(gr.Request(session_hash=session.key))
    offered = status.offered(session)
    assert offered["visible"] and [value for _, value in offered["choices"]] == [f"#{t}" for t, _ in told.value.pieces]
