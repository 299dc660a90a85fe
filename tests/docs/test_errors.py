"""docs/errors.md quotes messages: the code above each quotation raises it, word for word where words are quoted."""

import itertools
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
BLOCK = re.compile(r"^```(python|py|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(found[1], found[2]) for found in BLOCK.finditer(PAGE.read_text("utf-8"))]
QUOTED = [(code, quote) for (kind, code), (_, quote) in itertools.pairwise(BLOCKS) if kind == "py"]


def words(text: str) -> str:
    return " ".join(text.split())


def test_every_piece_of_failing_code_is_followed_by_its_message() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds == ["python", *["py", "text"] * len(QUOTED)] and len(QUOTED) >= 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quoted_messages_are_what_the_code_raises(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__page__"}
    exec(BLOCKS[0][1], names)
    wrong = []
    for code, quote in QUOTED:
        kind, message = words(quote).split(": ", 1)
        try:
            exec(code, names)
            wrong.append(f"{code} raised nothing")
        except Exception as error:
            said, at = words(str(error).strip("'\"") if isinstance(error, KeyError) else str(error)), 0
            for part in (part.strip() for part in message.split("...")):
                found = said.find(part, at)
                if found < 0 or type(error).__name__ != kind:
                    wrong.append(f"{code} raised {type(error).__name__}: {said}; quoted {part!r}")
                    break
                at = found + len(part)
    assert not wrong, "\n".join(wrong)
