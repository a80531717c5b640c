"""The report of a made-up run: what it says, that it is one safe file, and that a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from synthetic_run import TRAP, write_run

from l2l_core import records
from l2l_core.errors import ArtifactError
from l2l_core.report import PANEL_PX, spread
from stages import evaluate, report

ROUNDS, CASES = 2, 4


class Page(HTMLParser):
    """The tags, the text and the table rows of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.in_table = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.in_table = self.in_table or tag == "tbody"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_table = self.in_table and tag != "table"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make_report(folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int = ROUNDS) -> str:
    params = Path("params.yaml").read_text().replace("cases: 12", f"cases: {CASES}")
    (folder / "params.yaml").write_text(params)
    monkeypatch.chdir(folder)
    for stage in (evaluate, report):
        monkeypatch.setattr("sys.argv", ["stage", "--round", str(rounds)])
        stage.main()
    return Path("report/index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, ROUNDS)
    return folder


@pytest.fixture(scope="module")
def text(run_folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        return make_report(run_folder, patch)


def test_sentences_are_shown_and_not_run(text: str) -> None:
    page = Page(text)
    assert f"“{TRAP}”" in "".join(page.text)  # as text, with its angle brackets
    assert not page.all("script")
    assert "<script" not in text


def test_the_page_is_one_file_that_needs_no_network(text: str) -> None:
    page = Page(text)
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert not page.all("link")[1:]  # the empty icon is the only one
    assert not re.search(r"@import|url\((?!#)", text)  # url(#...) refers to a part of a drawing


def test_every_picture_decodes_and_says_what_it_shows(text: str) -> None:
    pictures = Page(text).all("img")
    assert len(pictures) == 4 * CASES * 6  # accepted, rejected, failed, right
    assert all(": " in picture["alt"] for picture in pictures)
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,"))))
        assert max(image.size) == PANEL_PX
    drawings = [drawing["aria-label"] for drawing in Page(text).all("svg")]
    assert len(drawings) == 2 + 2 + 1 + 5  # a split each; coverage, reliability; loss; a column of the policy each
    assert len(set(drawings)) == len(drawings)


def test_ids_are_unique_and_links_lead_somewhere(text: str) -> None:
    page = Page(text)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_scores_are_those_of_the_metrics_file(text: str, run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics/evaluate.json").read_text())
    rows = Page(text).rows
    scores = ["miou", "oiou", "pr50", "pr60", "pr70", "pr80", "pr90"]
    for split in ("val", "test"):
        gain = metrics[f"{split}_miou"] - metrics[f"{split}_supervised_miou"]
        assert ["round 2", *(f"{metrics[f'{split}_{name}']:.2f}" for name in scores), f"{gain:+.2f}"] in rows
    for name in ("prior only", "supervised only", "round 0 (warm-up)", "round 1", "round 2, no prior"):
        assert sum(row[0] == name and len(row) == 9 for row in rows) == 2
    quality = [value for name, value in metrics.items() if name.startswith("pseudo_round_2_")]
    assert ["round 2", *(f"{value:.2f}" for value in quality)] in rows


def test_a_stage_without_what_it_needs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "--round", "1"])
    with pytest.raises(ArtifactError, match=r"metrics/evaluate.json: not found"):
        report.main()


def test_equal_runs_give_equal_bytes(text: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("report", "plots", "metrics"):
        shutil.rmtree(run_folder / name)
    assert make_report(run_folder, monkeypatch) == text


def test_without_a_round_there_are_no_pseudo_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, rounds=0)
    page = Page(make_report(tmp_path, monkeypatch, rounds=0))
    assert [section["id"] for section in page.all("section")] == ["scores", "training", "failed", "right"]


def test_labels_of_unknown_truth_are_shown_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, rounds=1)
    path = tmp_path / records.INDEX.refs
    refs = records.read_table(path, records.REFS)
    rows = zip(refs["split"].to_pylist(), refs["ann_id"].to_pylist(), strict=True)
    unknown = [-1 if split == "train" else ann_id for split, ann_id in rows]
    refs = refs.set_column(refs.schema.get_field_index("ann_id"), "ann_id", pa.array(unknown, pa.int64()))
    records.write_table(refs, path, records.REFS)
    page = Page(make_report(tmp_path, monkeypatch, rounds=1))
    assert any(picture["alt"].startswith("label (") for picture in page.all("img"))
    assert not any(picture["alt"].startswith("mask against truth") for picture in page.all("img"))
    coverage = json.loads((tmp_path / "metrics/evaluate.json").read_text())["pseudo_round_1_coverage"]
    assert ["round 1", f"{coverage:.2f}", *["n/a"] * 9] in page.rows


def test_cases_are_spread_over_the_range_and_over_images() -> None:
    sent_id = pd.Series(range(20))
    rows = pd.DataFrame({"sent_id": sent_id, "image_id": sent_id // 2, "iou": sent_id // 2 / 10})
    chosen = spread(rows.sample(frac=1, random_state=3), "iou", 4)
    assert chosen["image_id"].tolist() == [0, 3, 6, 9]
    assert chosen.equals(spread(rows, "iou", 4))
    assert {sent_id % 2 for sent_id in spread(rows, "iou", 10)["sent_id"]} == {0, 1}  # not always an image's first
    assert len(spread(rows, "iou", 50)) == 10
    assert spread(rows.iloc[:0], "iou", 3).empty
    assert len(spread(rows, "iou", 1)) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed: the page is not opened")
def test_a_browser_shows_every_picture_and_a_phone_needs_no_sideways_scrolling(text: str, tmp_path: Path) -> None:
    # The page itself forbids scripts, so the one that asks the browser goes into a copy that does not.
    probe = """<script>onload = () => Object.assign(document.body.dataset, {
        broken: [...document.images].filter(image => !image.naturalWidth).length, shown: document.images.length,
        scrolls: document.documentElement.scrollWidth > document.documentElement.clientWidth})</script>"""
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", probe + "</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "probed.html").write_text(copy, encoding="utf-8")
    plain, probed = (open_in_chromium(tmp_path / name, tmp_path / "profile") for name in ("page.html", "probed.html"))
    assert "CONSOLE" not in plain.stderr  # neither errors nor anything that the security policy had to stop
    state = re.search(r"<body[^>]*>", probed.stdout)
    assert state is not None
    assert f'data-shown="{4 * CASES * 6}"' in state[0]
    assert 'data-broken="0"' in state[0]
    assert 'data-scrolls="false"' in state[0]


def open_in_chromium(page: Path, profile: Path) -> "subprocess.CompletedProcess[str]":
    quiet = ["background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    size = ["--window-size=500,900", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    command = ["chromium", *flags, *size, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
