"""Files of tests/ have names of their own: pytest imports them by name, whatever their folder."""

from __future__ import annotations

from collections import Counter

from source_tree import ROOT


def test_no_two_files_of_the_tests_share_a_name():
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
