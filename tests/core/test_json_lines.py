"""JSON lines in every encoding and with every line ending."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest

from l2l_core.core.json_lines import json_object, numbered_lines
from l2l_core.errors import InputError

ROWS = '{"a": "dog \u2028 h\u00fcndchen \u72ac"}', '{"b": 2}'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("utf-32-le", codecs.BOM_UTF32_LE),
    ],
)
def test_reads_the_same_rows_in_every_encoding(tmp_path: Path, encoding: str, mark: bytes, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mark + end.join([ROWS[0], "", "  ", ROWS[1]]).encode(encoding))
    lines = numbered_lines(path)
    assert lines == [(1, ROWS[0]), (4, ROWS[1])]
    assert [json_object(line) for _, line in lines] == [{"a": "dog \u2028 h\u00fcndchen \u72ac"}, {"b": 2}]


def test_reads_concatenated_files_with_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}\n' + codecs.BOM_UTF8 + b'{"a": 2}\n')
    assert [json_object(line) for _, line in numbered_lines(path)] == [{"a": 1}, {"a": 2}]


def test_refuses_only_the_line_with_invalid_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n{"a": 3}')
    (_, first), (number, second), (_, third) = numbered_lines(path)
    assert (json_object(first), number, json_object(third)) == ({"a": 1}, 2, {"a": 3})
    with pytest.raises(ValueError, match=r"^not JSON in UTF-8: character 8 cannot be decoded; save the file as UTF-8$"):
        json_object(second)


def test_reports_broken_utf_16_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}'.encode("utf-16") + b"\x00")
    with pytest.raises(
        InputError, match=r"rows\.jsonl: begins like utf-16, but byte 18 does not fit; save it as UTF-8"
    ):
        numbered_lines(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2; expected one object a line"),
        ("[1]", "got a JSON list, expected an object"),
        ("null", "got a JSON NoneType, expected an object"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON that can be read: a number of thousands of digits"),
        ('{"a": ' * 100_000, "not JSON that can be read: nested too deeply"),
    ],
)
def test_refuses_a_line_that_is_not_a_json_object(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_object(line)


def test_refuses_a_pipe_a_device_and_a_folder(tmp_path: Path) -> None:
    """Reading the first would wait for ever, reading the second would never end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, kind in ((tmp_path / "pipe.jsonl", "not a regular file"), (Path("/dev/zero"), "not a regular file")):
        with pytest.raises(InputError, match=rf"{path}: {kind}, expected a file$"):
            numbered_lines(path)
    with pytest.raises(InputError, match=r": a folder, expected a file$"):
        numbered_lines(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_reports_impossible_names_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read: [^\n]*$"):
        numbered_lines(tmp_path / name)
