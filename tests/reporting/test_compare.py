"""Comparison of experiments: the page, refused input, and where runs are read from."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from called import call
from synthetic_run import write_evaluated_run

from l2l_core.artifacts import records
from l2l_core.reporting.compare import NEEDED

TRAP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_evaluated_run(folder)
    return folder


@pytest.fixture
def runs(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder with two runs: `one`, the model of round 1, and `two`, round 2 with another policy."""
    for name in ("one", "two"):
        for path in NEEDED:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(evaluated / path, tmp_path / name / path)
    change_metrics(tmp_path / "one", evaluated_round=1)
    params = tmp_path / "two/params.yaml"
    params.write_text(
        params.read_text().replace("method: reinforce ", f"method: '{TRAP}' ").replace("seed: 7", "sead: 7")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_metrics(folder: Path, **values: object) -> None:
    path = folder / records.METRICS_PATH
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_table(folder: Path, path: Path, schema: object, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    rows = change(records.to_frame(records.read_table(folder / path, schema)))
    records.write_table(records.make_table(rows.to_dict("records"), schema), folder / path, schema)


def rows_of(page: str) -> list[list[str]]:
    """Rows of all tables, as text."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [[re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in found]


def test_shows_scores_side_by_side_with_differences(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "compare", "one", "two") == 0
    said, said_of_distilled, where = capsys.readouterr().out.splitlines()
    assert where == "comparison: report/compare.html"
    page = Path("report/compare.html").read_text(encoding="utf-8")
    rows = rows_of(page)
    metrics = json.loads((runs / "two" / records.METRICS_PATH).read_text())
    miou = [row for row in rows if row[0] == "mIoU"]
    for split, row in zip(("val", "test"), miou, strict=True):
        before, after, difference = map(float, row[1:])
        assert (before, after) == (metrics[f"{split}_round_1_miou"], metrics[f"{split}_miou"])
        assert difference == pytest.approx(after - before, abs=0.011)  # each of the three is rounded
        paired = next(row for row in rows if row[0] == "B − A" and len(row) == 8 and row[1] == f"{difference:+.2f}")
        assert f"{split} {paired[1]} ({paired[2]} to {paired[3]})" in said
    assert said.startswith("mIoU of two - one, 95 % interval: val ")
    same = [row[-1] for row in rows if row[0] in ("mIoU, supervised only", "mIoU, prior only")]
    assert same == ["+0.00"] * 4
    assert not any(row[0] == "round" for row in rows)  # the parameter is the same in both
    assert ["select.method", "reinforce", TRAP.replace("<", "&lt;").replace(">", "&gt;")] in rows
    assert ["refshapes.seed", "7", "not there"] in rows
    assert ["refshapes.sead", "not there", "7"] in rows
    distilled = [row[1] for row in rows if row[0] == "mIoU, distilled, no prior"]
    assert distilled == [f"{metrics[f'{split}_distilled_miou']:.2f}" for split in ("val", "test")]
    assert said_of_distilled == "mIoU of two - one, distilled models without priors: val +0.00, test +0.00"
    assert TRAP not in page


def test_leaves_out_the_distilled_model_where_a_run_of_an_earlier_version_has_none(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_table(
        runs / "two",
        records.PER_SENTENCE_PATH,
        records.PER_SENTENCE,
        lambda rows: rows[rows["method"] != "distilled"],
    )
    assert call(monkeypatch, "compare", "one", "two") == 0
    page = Path("report/compare.html").read_text(encoding="utf-8")
    assert "distilled" not in page
    assert "mIoU, supervised only" in page


def test_compares_predictions_for_the_same_sentences_in_pairs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "compare", "one", "two", "--out", "page") == 0
    rows = rows_of(Path("page/compare.html").read_text(encoding="utf-8"))
    table = records.to_frame(records.read_table(runs / "one" / records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    paired = [row for row in rows if row[0] == "B − A" and len(row) == 8]
    for split, row in zip(("val", "test"), paired, strict=True):
        iou = table[table["split"] == split].pivot(index="sent_id", columns="method", values="iou")
        difference = iou["round_2"] - iou["round_1"]
        mean, low, high, better, worse, reached, lost = map(float, row[1:])
        assert mean == pytest.approx(100 * difference.mean(), abs=0.006)
        assert low < mean < high
        assert better == pytest.approx(100 * (difference > 0.05).mean(), abs=0.006)
        assert worse == pytest.approx(100 * (difference < -0.05).mean(), abs=0.006)
        now, then = ((iou[method] >= 0.5).mean() for method in ("round_2", "round_1"))
        assert reached - lost == pytest.approx(100 * (now - then), abs=0.011)


def test_page_is_safe_and_deterministic(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in ("first", "second"):
        assert call(monkeypatch, "compare", "one", "two", "--out", out) == 0
    page = Path("first/compare.html").read_text(encoding="utf-8")
    assert page == Path("second/compare.html").read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in page
    assert "script-src" not in page
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page


def more_sentences(folder: Path) -> None:
    change_table(
        folder,
        records.PER_SENTENCE_PATH,
        records.PER_SENTENCE,
        lambda rows: rows[rows["sent_id"] != rows["sent_id"].max()],
    )


def other_words(folder: Path) -> None:
    change_table(folder, records.INDEX.refs, records.REFS, lambda rows: rows.assign(sentence="it " + rows["sentence"]))


def other_masks(folder: Path) -> None:
    change_table(
        folder,
        records.PER_SENTENCE_PATH,
        records.PER_SENTENCE,
        lambda rows: rows.assign(gt_area_px=rows["gt_area_px"] + 1),
    )


def other_data(folder: Path) -> None:
    path = folder / "params.yaml"
    path.write_text(path.read_text().replace("dataset: data/refshapes", "dataset: data/mine"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (other_data, "one and two: different datasets, refshapes and mine; scores do not compare"),
        (
            lambda folder: change_metrics(folder, dataset_version="2"),
            "one and two: different datasets, refshapes and refshapes, version 2; scores do not compare",
        ),
        (
            more_sentences,
            "one and two: different sentences, sent_id 47 evaluated in one alone; use the same evaluate.splits",
        ),
        (other_words, "one and two: different sentences, first at sent_id 16; scores do not compare"),
        (other_masks, "one and two: different true masks, first at sent_id 16; scores do not compare"),
        (
            lambda folder: change_metrics(folder, evaluated_round=3),
            "two: data/evaluation/per_sentence.parquet has no row of round 3, which metrics/evaluate.json is about; "
            "run dvc repro there",
        ),
        (
            lambda folder: (folder / records.METRICS_PATH).unlink(),
            "two: metrics/evaluate.json not found; run its pipeline (dvc repro) and, of a Git revision, commit "
            "params.yaml, *.lock and metrics; or fetch what was left elsewhere "
            "(dvc pull)",
        ),
        (
            lambda folder: (folder / records.PER_SENTENCE_PATH).write_text("no table"),
            "two: data/evaluation/per_sentence.parquet: not a Parquet file of this project: .*",
        ),
    ],
)
def test_refuses_incomparable_runs_in_one_line(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    complaint: str,
) -> None:
    change(runs / "two")
    assert call(monkeypatch, "compare", "one", "two") == 2
    pattern = complaint if complaint.endswith(".*") else re.escape(complaint)
    assert re.fullmatch(f"error: compare: {pattern}\n", capsys.readouterr().err)
    assert not Path("report").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["one"], r"got 1 run\(s\), expected 2 to 26 to compare"),
        (["one", "two", "one"], "got one, two, one, expected each run once"),
        (["one", "three"], r"got 'three', expected a project's folder, or a Git revision or DVC experiment .*"),
    ],
)
def test_refuses_too_few_or_unknown_runs(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    assert call(monkeypatch, "compare", *words) == 2
    assert re.fullmatch(f"error: compare: {complaint}\n", capsys.readouterr().err)


@pytest.mark.pipeline
@pytest.mark.parametrize("place", ["project", "repository/project"])
def test_git_revision_and_experiment_give_the_same_page_as_their_folders(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """The project is the Git repository or a subfolder of it."""
    project = tmp_path / place
    shutil.copytree(runs / "one", project)
    tables = [str(records.PER_SENTENCE_PATH), str(records.INDEX.refs)]

    def run(*words: str) -> None:
        subprocess.run(words, cwd=project, check=True, capture_output=True)

    def dvc(*words: str) -> None:
        run(sys.executable, "-m", "dvc", *words)

    run("git", "init", "-q", str(tmp_path / Path(place).parts[0]))
    for name in ("user.name", "user.email"):
        run("git", "config", name, "me")
    dvc("init", "-q", *(["--subdir"] if "/" in place else []))
    dvc("add", "-q", *tables)
    run("git", "add", "-A")
    run("git", "commit", "-qm", "one")
    run("git", "tag", "base")
    for path in NEEDED:
        (project / path).unlink()
        shutil.copy(runs / "two" / path, project / path)
    dvc("add", "-q", *tables)
    dvc("exp", "save", "-q", "-n", "later")
    run("git", "checkout", "-qf", "base")
    for table in tables:
        (project / table).unlink()  # only DVC's cache has them now

    assert call(monkeypatch, "compare", "one", "two", "--out", "folders") == 0
    monkeypatch.chdir(project)
    assert call(monkeypatch, "compare", "base", "later", "--out", tmp_path / "revisions") == 0
    of_folders, of_revisions = (
        (tmp_path / name / "compare.html").read_text(encoding="utf-8") for name in ("folders", "revisions")
    )
    assert rows_of(of_revisions) == rows_of(of_folders)
    assert "later, round 2" in of_revisions

    shutil.rmtree(project / ".dvc/cache/files")
    capsys.readouterr()
    assert call(monkeypatch, "compare", "base", "later") == 2
    assert capsys.readouterr().err.startswith("error: compare: base: data/evaluation/per_sentence.parquet not found; ")
