"""The commands of README.md exist (modules and parameters: tests/test_docs.py)."""

from __future__ import annotations

import re
import shlex
import subprocess

from bench.tiny_project import ROOT, environment

FIRST_SCREEN_LINES = 25


def commands() -> list[list[str]]:
    """Commands in README.md: indented lines and `inline` code that start with make, dvc or python."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    typed = re.findall(r"^    (.+)$|`([^`\n]+)`", text, re.MULTILINE)
    lines = [(block or inline).strip() for block, inline in typed]
    parsed = [shlex.split(line, comments=True) for line in lines if re.match(r"(make|dvc|python) \S", line)]
    assert {words[0] for words in parsed} == {"make", "dvc", "python"}
    return parsed


def test_first_screen_of_the_readme_shows_make_demo_and_make_test():
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:FIRST_SCREEN_LINES])
    assert "make demo" in first
    assert "make test" in first


def test_ci_runs_the_tests_named_in_the_readme():
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    made = [line.removeprefix("exec ") for line in lines if line.removeprefix("exec ").startswith("make ")]
    assert made == ["make test", "make docs", "make vllm-cpu", "make test-vllm"]


def test_make_targets_exist():
    for command in commands():
        if command[0] == "make":
            plan = subprocess.run(
                ["make", "--dry-run", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert plan.returncode == 0, plan.stderr


def test_dvc_commands_exist():
    nested = ("metrics", "exp", "plots", "queue", "params")
    used = {tuple(command[1 : 3 if command[1] in nested else 2]) for command in commands() if command[0] == "dvc"}
    assert used
    for words in sorted(used):
        done = subprocess.run(["dvc", *words, "--help"], env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
