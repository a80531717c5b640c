"""The default-run benchmark: what it measures, which rows it keeps and what it compares."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import default_run

OLD, NEW, NEWER = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00"


def row(
    commit: str, committed: str, seconds: float, settings: str = "", device: str = "cpu, 2 cores"
) -> dict[str, Any]:
    common = {"commit": commit, "committed": committed, "settings": settings, "device": device, "measure": "first"}
    measured = {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_rss_mb": 1024, "policy_percent": 5.0}
    return common | measured | {"stage_seconds": {"query": seconds}, "val_miou_warmup": 50.0}


def nothing(commit: str, committed: str) -> dict[str, Any]:
    return row(commit, committed, 2.0) | {"measure": "nothing_to_do"}


def cells(text: str) -> dict[str, list[str]]:
    """First cell of each line of the tables -> the others."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {first: rest for first, *rest in lines}


def test_keeps_rows_of_other_commits_settings_and_machines() -> None:
    others = [
        row("aaa", OLD, 1),
        row("bbb", NEW, 2, "train.precision=fp32"),
        row("bbb", NEW, 3, device="gpu"),
        nothing("bbb", NEW),
    ]
    assert default_run.with_new([row("bbb", NEW, 4), *others], [row("bbb", NEW, 5)]) == [*others, row("bbb", NEW, 5)]


def test_readme_line_describes_the_latest_commit_with_default_settings() -> None:
    rows = [row("ccc", NEWER, 60), nothing("ccc", NEWER), row("ddd", NEWER, 6, "round=1"), row("aaa", OLD, 600)]
    assert default_run.latest(rows, "cpu, 2 cores")["commit"] == "ccc"
    line = " ".join(default_run.line(rows).split())
    assert (
        "took 1.0 minutes and 1.0 GiB of memory (cpu, 2 cores; commit ccc). A rerun without changes took 2.0 s" in line
    )
    assert line.endswith("mIoU on val: warm-up 50.0.")


def test_readme_line_and_tables_name_each_machine() -> None:
    slow = row("bbb", NEW, 600, device="slow") | {"val_miou_warmup": 40.0}
    rows = [slow, row("aaa", OLD, 900, device="slow"), row("ccc", NEWER, 60), nothing("ccc", NEWER)]
    rows += [row("ddd", NEWER, 6, "round=1", device="only with settings")]
    line = " ".join(default_run.line(rows).split())
    first, second = "1.0 minutes and 1.0 GiB of memory (cpu, 2 cores; commit ccc)", "10.0 minutes and 1.0 GiB of memory"
    assert f"{first} or {second} (slow; commit bbb)." in line
    assert line.endswith("mIoU on val: warm-up 50.0.")
    fast, other = default_run.table(rows).split("**slow**")
    assert fast.startswith("**cpu, 2 cores**")
    assert cells(fast)["query"] == ["60.0"]
    assert cells(other)["query"] == ["900.0", "600.0", "1.50"]


def test_row_without_a_date_counts_as_the_oldest() -> None:
    undated = {key: value for key, value in row("aaa", OLD, 9).items() if key not in ("committed", "settings")}
    dated = row("bbb", NEW, 1)
    assert default_run.latest([dated, undated], "cpu, 2 cores") == dated
    assert default_run.before([dated, undated], dated) == [undated]
    assert default_run.machines([undated | {"device": "another"}, dated]) == ["cpu, 2 cores"]


def test_table_shows_before_and_after_with_their_ratio() -> None:
    rows = [
        row("aaa", OLD, 120),
        row("aaa", OLD, 90, "train.precision=fp32"),
        row("bbb", NEW, 50),
        row("ccc", NEWER, 30),
        row("aaa", OLD, 1, device="another"),
    ]
    found = cells(default_run.machine_table(rows, "cpu, 2 cores"))
    assert found["stage"] == [
        "aaa, s", "aaa train.precision=fp32, s", "ccc, s", "aaa / ccc", "aaa train.precision=fp32 / ccc"
    ]  # fmt: skip
    assert found["query"] == ["120.0", "90.0", "30.0", "4.00", "3.00"]
    assert found["all, wall time"] == ["120.0", "90.0", "30.0", "4.00", "3.00"]
    assert found["all, CPU time"] == ["240.0", "180.0", "60.0", "4.00", "3.00"]
    assert found["aaa train.precision=fp32"] == ["50.0"]


def test_table_lists_the_youngest_run_of_other_seeds() -> None:
    rows = [
        row("000", OLD, 10),
        row("aaa", NEW, 9, "seed=1"),
        row("bbb", NEWER, 8, "seed=1"),
        row("bbb", NEWER, 7, "seed=2", device="another"),
        row("bbb", NEWER, 6, "round=1"),
        row("ccc", NEWER, 5),
    ]
    found = cells(default_run.table(rows))
    assert found["bbb seed=1"] == found["ccc"] == ["50.0"]
    assert not {"aaa seed=1", "bbb seed=2", "bbb round=1"} & found.keys()


def test_table_leaves_cells_empty_for_stages_missing_in_a_revision() -> None:
    after = row("bbb", NEW, 30) | {"stage_seconds": {"fit": 10.0, "query": 20.0}}
    before = row("aaa", OLD, 60) | {"stage_seconds": {"query": 40.0, "warmup": 20.0}}
    found = cells(default_run.table([before, after]))
    assert found["fit"] == ["", "10.0", ""]
    assert found["query"] == ["40.0", "20.0", "2.00"]
    assert found["warmup"] == ["20.0", "", ""]


def test_table_joins_a_renamed_stage_with_its_earlier_name() -> None:
    before = row("aaa", OLD, 60) | {"stage_seconds": {"ask": 40.0}}
    found = cells(default_run.table([before, row("bbb", NEW, 20)]))
    assert found["query"] == ["40.0", "20.0", "2.00"]
    assert "ask" not in found


def test_reads_the_scores_of_every_model() -> None:
    metrics = {
        "val_miou": 3.0,
        "val_supervised_miou": 1.0,
        "val_round_0_miou": 2.0,
        "val_round_1_miou": 3.0,
        "val_prior_miou": 4.0,
        "val_no_prior_miou": 5.0,
        "val_distilled_miou": 6.0,
        "n_val": 9,
    }
    assert default_run.read_scores(metrics) == {
        "val_miou": 3.0,
        "val_miou_proposal": 4.0,
        "val_miou_supervised": 1.0,
        "val_miou_warmup": 2.0,
        "val_miou_round_1": 3.0,
        "val_miou_no_prior": 5.0,
        "val_miou_distilled": 6.0,
    }


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    return subprocess.check_output(["git", *identity, *words], cwd=folder, text=True).strip()


def test_prepares_another_revision_with_changed_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    git(tmp_path, "init", "-q", str(project))
    for steps in (1, 2):
        (project / "params.yaml").write_text(f"train: {{steps: {steps}, precision: bf16}}\n")
        git(project, "add", ".")
        git(project, "commit", "-qm", str(steps))
    monkeypatch.setattr(default_run, "ROOT", project)
    monkeypatch.setattr(default_run, "CLONE", tmp_path / "clone")
    commit, committed = default_run.prepare("HEAD~1", ["train.precision=fp32"])
    assert git(project, "rev-parse", "HEAD~1").startswith(commit)
    assert committed == git(project, "show", "-s", "--format=%cI", "HEAD~1")
    params = yaml.safe_load((tmp_path / "clone" / "params.yaml").read_text())
    assert params == {"train": {"steps": 1, "precision": "fp32"}}


@pytest.mark.pipeline
def test_times_stages_in_execution_order(tmp_path: Path) -> None:
    stages = {
        "first": {
            "cmd": "python -c 'sum(range(3000000))' && echo policy 'trained' in 1.5 s && touch one",
            "outs": ["one"],
        },
        "second": {"cmd": "echo policy 'trained' in 2.0 s && touch two", "deps": ["one"], "outs": ["two"]},
    }
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    git(tmp_path, "init", "-q")
    subprocess.run(["dvc", "init", "-q"], cwd=tmp_path, check=True)
    found = default_run.repro(tmp_path)
    assert list(found.stage_seconds) == list(found.stage_cpu_seconds) == ["first", "second"]
    assert found.policy_seconds == 3.5
    assert 0 < sum(found.stage_cpu_seconds.values()) <= found.cpu_seconds + 0.1
    assert default_run.repro(tmp_path).stage_seconds == {}
