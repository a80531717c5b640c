"""Runs the commands of docs/experiments.md in order after a first run and checks their effects."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bench.tiny_project import ROOT, Project, executed

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

RATES, POLICIES, SEEDS = (
    [f"rate-{n}" for n in (1, 2)],
    [f"method-{n}" for n in (1, 2, 3)],
    [f"seed-{n}" for n in (1, 2, 3)],
)
NOT_RUN = ["rate-2", "method-2", "round"]
"""Experiments that the test removes from the queue, in addition to the page, because they train for minutes."""

Outputs = dict[str, str]
"""Output of each command of a section."""


def sections() -> Iterator[tuple[str, list[str]]]:
    """Title and commands of every numbered section."""
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        number, title = section.splitlines()[0].split(". ", 1)
        assert number.isdigit()
        yield title, re.findall(r"^    (\S.*)$", section, re.MULTILINE)


@pytest.fixture
def project(first_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy without the experiments of other tests, with a Git and a DVC remote beside it."""
    monkeypatch.setenv("COLUMNS", "200")  # terminal width
    project = first_run.project.copy(tmp_path / "project")
    project.run("dvc", "exp", "remove", "--all-commits")
    project.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", "../shared.git")
    project.run("git", "remote", "add", "origin", "../shared.git")
    project.run("git", "push", "--quiet", "origin", "main")
    project.run("dvc", "remote", "add", "--local", "--default", "storage", "../storage")
    return project


def test_every_command_does_what_the_page_says(project):
    first = json.loads(project.read("metrics/evaluate.json"))
    titles = []
    for title, commands in sections():
        titles.append(title)
        outputs: Outputs = {}
        for command in commands:
            if command.endswith("--run-all"):
                project.run("dvc", "queue", "remove", *NOT_RUN)
            # DVC complains about rounds that never ran; the other outputs are checked at the end.
            code = None if command.startswith("dvc exp apply") else 0
            outputs[command] = project.run(*shlex.split(command), code=code)
        CHECKS[title](project, outputs)
        assert project.out("git", "status", "--porcelain") == ""
        assert json.loads(project.read("metrics/evaluate.json")) == first
    assert titles == list(CHECKS)


def queued(project: Project) -> set[str]:
    return set(re.findall(r"^\w{7} +([\w-]+) .* Queued$", project.out("dvc", "queue", "status"), re.MULTILINE))


def rates(project: Project, outputs: Outputs) -> None:
    assert queued(project) == set(RATES)


def rounds(project: Project, outputs: Outputs) -> None:
    """All queued experiments, each with the parameters of its command."""
    shown = csv.DictReader(io.StringIO(project.out("dvc", "exp", "show", "--csv")))
    share = str(yaml.safe_load(project.read("params.yaml"))["split"]["labeled_fraction"])
    keys = ("split.labeled_fraction", "select.method", "seed", "round")
    found = {row["Experiment"]: tuple(row[key] for key in keys) for row in shown if row["State"] == "Queued"}
    assert found == {
        "rate-1": ("0.05", "reinforce", "0", "1"),
        "rate-2": ("0.1", "reinforce", "0", "1"),
        "method-1": (share, "reinforce", "0", "1"),
        "method-2": (share, "ranksum", "0", "1"),
        "method-3": (share, "agreement", "0", "1"),
        "seed-1": (share, "reinforce", "0", "1"),
        "seed-2": (share, "reinforce", "1", "1"),
        "seed-3": (share, "reinforce", "2", "1"),
        "round": (share, "reinforce", "0", "3"),
    }


def queue(project: Project, outputs: Outputs) -> None:
    status, _, run = outputs.values()
    assert all(name in status for name in (*RATES, *POLICIES, *SEEDS, "round"))
    assert queued(project) == set()
    # method-1 repeats the first run and comes from the cache.
    assert sorted(executed(run)) == sorted(
        ["crossfit-0", "select@1", "retrain@1", "predict@1", "distill", "predict-distilled", "evaluate", "report"]
    )
    done = set(project.out("dvc", "exp", "list", "--name-only").split())
    assert {"method-1", "method-3"} <= done
    assert not done & {*RATES, *SEEDS, *NOT_RUN}


def table(project: Project, outputs: Outputs) -> None:
    (text,) = outputs.values()
    rows = [line.split() for line in text.splitlines() if line.strip(" ─")]
    assert rows[0] == ["Experiment", "val_miou", "test_miou", "select.method"]
    policies = {line[-4]: line[-1] for line in rows[2:]}
    assert policies["[method-1]"] == "reinforce"
    assert policies["[method-3]"] == "agreement"
    scores = [float(line[-3]) for line in rows[2:]]  # the first row is the baseline
    assert scores == sorted(scores, reverse=True)


def comparison(project: Project, outputs: Outputs) -> None:
    metrics, params, plots = outputs.values()
    changes = re.findall(r"^metrics/evaluate\.json +(\w+) +(\S+) +(\S+) +(\S+)$", metrics, re.MULTILINE)
    now = json.loads(project.read("metrics/evaluate.json"))
    assert changes
    for name, old, new, change in changes:
        assert old == "-" or float(old) == pytest.approx(now[name], abs=1e-4)
        assert "-" in (old, new) or float(new) - float(old) == pytest.approx(float(change), abs=1e-4)
    assert re.search(r"^params\.yaml +select\.method +reinforce +agreement$", params, re.MULTILINE)
    assert "dvc_plots/index.html" in plots
    page = project.read("dvc_plots/index.html").decode()
    assert "method-3" in page
    assert "HEAD" in page


def application(project: Project, outputs: Outputs) -> None:
    _, difference, _, again = outputs.values()
    assert re.search(r"^params\.yaml +select\.method +reinforce +agreement$", difference, re.MULTILINE)
    assert executed(again) == []
    assert yaml.safe_load(project.read("params.yaml"))["select"]["method"] == "reinforce"


def sharing(project: Project, outputs: Outputs) -> None:
    _, listed = outputs.values()
    assert "method-3" in listed
    assert "method-1" not in listed
    project.run("git", "clone", "--quiet", "../shared.git", "../clone")
    clone = Project(project.folder.parent / "clone")
    clone.run("dvc", "remote", "add", "--local", "--default", "storage", "../storage")
    clone.run("dvc", "exp", "pull", "origin", "method-3")
    clone.run("dvc", "exp", "apply", "method-3", code=None)
    metrics = json.loads(project.out("dvc", "metrics", "diff", "--all", "--json", "HEAD", "method-3"))
    here = {key: value["new"] for key, value in metrics["metrics/evaluate.json"].items() if "new" in value}
    there = json.loads(clone.read("metrics/evaluate.json"))
    assert there == {key: here[key] for key in there}
    assert clone.read("data/rounds/1/model/model.safetensors")


def cleaning(project: Project, outputs: Outputs) -> None:
    assert "method-3" in project.out("dvc", "exp", "list", "--name-only").split()
    assert "method-1" not in project.out("dvc", "exp", "list", "--name-only").split()
    # Unused cache files are removed; files that an experiment needs are kept.
    idle = b"nobody needs this"
    digest = hashlib.md5(idle).hexdigest()
    path = project.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(idle)
    project.run(*shlex.split(list(outputs)[-1]))
    assert not path.exists()
    project.run("dvc", "exp", "apply", "method-3", code=None)
    assert project.stages_run("dvc", "repro") == []
    project.back()


def nothing_more(project: Project, outputs: Outputs) -> None:
    """`rounds` checks these experiments together with its own."""


CHECKS: dict[str, Callable[[Project, Outputs], None]] = {
    "Sweep the label rate": rates,
    "Compare methods of selection": nothing_more,
    "Several seeds": nothing_more,
    "Another round": rounds,
    "Look at the queue, and run it": queue,
    "Show them as a table": table,
    "Compare the numbers and curves of two": comparison,
    "Take one into the workspace": application,
    "Share one": sharing,
    "Clean up": cleaning,
}
