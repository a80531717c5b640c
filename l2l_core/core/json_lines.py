"""The one reader of JSON lines: pairs, recorded answers and sentences, in any encoding of Unicode."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from l2l_core.errors import InputError

BOM = "\ufeff"


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number from 1 on.

    UTF-8, UTF-16 and UTF-32 are read, with a byte order mark or without. Line ends are those of Unix, Windows and old
    Macs. Bytes that are no UTF-8 stay in their line, which `json_object` then refuses. Raises OSError where the file
    cannot be read, and InputError where it is broken UTF-16 or UTF-32.
    """
    content = path.read_bytes()
    encoding = json.detect_encoding(content)
    try:
        text = content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: begins like {encoding}, but byte {error.start} does not fit; save it as UTF-8"
        ) from None
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return [(number, line.strip(BOM)) for number, line in lines if line.strip(BOM).strip()]


def json_object(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError that says in one line what stands there instead."""
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
    except ValueError:  # Python converts no whole number of more than some thousand digits
        raise ValueError("not JSON that can be read: a number of thousands of digits") from None
    if not isinstance(row, dict):
        raise ValueError(f"got a JSON {type(row).__name__}, expected an object")
    return row
