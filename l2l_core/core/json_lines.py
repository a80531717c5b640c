"""The only reader of JSON lines: pairs, recorded responses and sentences, in any Unicode encoding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from l2l_core.core.files import read_file
from l2l_core.errors import InputError

BOM = "\ufeff"


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The non-blank lines of a file with their line numbers, counted from 1.

    Reads UTF-8, UTF-16 and UTF-32, with or without a byte order mark, and line ends of Unix, Windows and old Macs.
    Invalid UTF-8 bytes stay in their line, which `json_object` then refuses. Raises FileNotFoundError, and
    InputError if the file cannot be read or is broken UTF-16 or UTF-32.
    """
    content = read_file(path)
    encoding = json.detect_encoding(content)
    try:
        text = content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: begins like {encoding}, but byte {error.start} does not fit; save it as UTF-8"
        ) from None
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return [(line_number, line.strip(BOM)) for line_number, line in lines if line.strip(BOM).strip()]


def json_object(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError with a one-line message if the line holds anything else."""
    try:
        line.encode("utf-8")
        row = json.loads(line)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"not JSON in UTF-8: character {error.start + 1} cannot be decoded; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}; expected one object a line") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply; expected one object a line") from None
    except ValueError:  # Python refuses integers of more than some thousand digits
        raise ValueError("not JSON that can be read: a number of thousands of digits") from None
    if not isinstance(row, dict):
        raise ValueError(f"got a JSON {type(row).__name__}, expected an object")
    return row
