"""Files of other kinds are refused before they are opened, and JSON that is not plain before it is used."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veena_lens.regular_files import json_object, parse_json, read_bytes, read_json, read_text, require_regular

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc\u2028\x85", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_plain_json_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text, "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[1]", "x holds a list; expected a JSON object"),
        (b"null", "x holds null"),
        (b"3", "x holds a number"),
        (b"true", "x holds a number"),
        (b'"a"', "x holds a text"),
        (b"", "x is not valid JSON"),
        (b'{"a": 1', "x is not valid JSON"),
        (b'\xff{"a": 1}', "x is not valid JSON: .*utf-8"),
        (b'\xef\xbb\xbf{"a": 1}', "x is not valid JSON: .*BOM"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number of JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 50 + b"}", "the integer 99999999999999999999... has 50 digits"),
        (b'{"a": ' + b"9" * 9000 + b"}", "has 9000 digits"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"\\ud800": 1}', "surrogates"),
        (b'{"a": ' * 80 + b"1" + b"}" * 80, "too many lists and objects"),
        (b"[" * 200_000, "x is not valid JSON"),
        (b'{"a":' * 200_000, "x is not valid JSON"),
    ],
    ids=range(20),
)
def test_json_that_is_not_a_plain_object_is_refused(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        json_object(content, "x")


def test_numbers_beyond_json_are_read_where_python_wrote_them() -> None:
    assert repr(json_object('{"a": NaN, "b": -Infinity}', "x", finite=False)) == "{'a': nan, 'b': -inf}"


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": _socket,
}


@pytest.mark.parametrize("kind", list(SPECIAL))
@pytest.mark.filterwarnings("ignore:unclosed.*socket")
def test_what_is_not_a_regular_file_is_refused_unopened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    SPECIAL[kind](path)
    done = threading.Event()

    def read() -> None:
        for reader in (read_json, read_text, require_regular):
            with pytest.raises(ValueError, match=f"x is {kind}, not a regular file"):
                reader(path)
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(5)


def test_sizes_links_and_names(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(path)
    assert read_json(tmp_path / "link.json") == {"a": 1} and require_regular(path) == 8
    with pytest.raises(ValueError, match="a.json has 8 bytes; at most 7 are read"):
        read_bytes(path, 7)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        require_regular("a\0b")
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="a.json is not UTF-8 text: invalid start byte at byte 2"):
        read_text(path)
