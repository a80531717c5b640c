"""The report of a synthetic run: its content, its safety as a single file, and its display in a browser."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from synthetic_run import TRAP, write_run

from l2l_core.artifacts import records
from l2l_core.core.masks import encode_rle
from l2l_core.errors import ArtifactError
from l2l_core.reporting.gallery import PANEL_PX, spread
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


def sent_ids(text: str) -> list[int]:
    """Sentence ids of all cases, in page order."""
    return [int(number) for number in re.findall(r" · sentence ([0-9]+)", text)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, ROUNDS)
    return folder


@pytest.fixture(scope="module")
def text(run_folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        return make_report(run_folder, patch)


def test_shows_sentences_without_running_them(text: str) -> None:
    page = Page(text)
    assert f"“{TRAP}”" in "".join(page.text)  # as text, with its angle brackets
    assert text.count("<script") == 1  # the page's script
    assert all(image["alt"].endswith(TRAP) for image in page.all("img") if "pwned" in image["alt"])


def test_security_policy_allows_only_the_page_script(text: str) -> None:
    policy = next(meta["content"] for meta in Page(text).all("meta") if "http-equiv" in meta)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    script = re.search(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert allowed.pop("script-src") == f"'sha256-{digest}'"
    assert allowed.pop("img-src") == "data:"
    assert allowed.pop("style-src") == "'unsafe-inline'"
    assert set(allowed) == {"default-src", "base-uri", "form-action"}
    assert set(allowed.values()) == {"'none'"}


def test_page_is_a_single_file_that_needs_no_network(text: str) -> None:
    page = Page(text)
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert not page.all("link")[1:]  # the empty icon is the only one
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)  # url(#...): part of a drawing


def test_every_picture_decodes_and_has_an_alt_text(text: str) -> None:
    page = Page(text)
    pictures = page.all("img")
    assert len(pictures) == 6 * len(page.all("article"))
    assert all(": " in picture["alt"] for picture in pictures)
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,"))))
        assert image.size == (int(picture["width"]), int(picture["height"]))
        assert max(image.size) == PANEL_PX
    drawings = [drawing["aria-label"] for drawing in page.all("svg")]
    assert len(drawings) == 2 + 3 + 1 + 5  # one per split; labels, coverage, reliability; loss; one per policy column
    assert len(set(drawings)) == len(drawings)


def test_shows_the_scores_of_priors_by_model(text: str) -> None:
    page = Page(text)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["all"] == ["85.00", "70.50", "64.00", "90.00", rows["all"][4], "61.25"]
    assert not any(character.isdigit() for character in rows["all"][4])  # undefined
    assert rows["replay org/<b>"][:5] == ["100.00", "81.00", "72.50", "95.00", "66.50"]
    assert "Priors on 20 labeled sentences, 3 without a prior" in "".join(page.text)


def test_shows_cases_of_every_kind_with_filter_attributes(text: str, run_folder: Path) -> None:
    cases = Page(text).all("article")
    kinds = Counter(case["data-kind"] for case in cases)
    assert (kinds["accepted"], kinds["rejected"]) == (CASES, CASES)
    assert max(kinds.values()) <= CASES
    assert {case["data-split"] for case in cases} == {"train", "val", "test"}
    refs = records.to_frame(records.read_table(run_folder / records.INDEX.refs, records.REFS)).set_index("sent_id")
    for case, sent_id in zip(cases, sent_ids(text), strict=True):
        assert (case["data-split"], case["data-style"]) == (refs.at[sent_id, "split"], refs.at[sent_id, "style"])


def test_changed_labels_differ_most_from_the_previous_round(text: str, run_folder: Path) -> None:
    path = run_folder / records.round_folder(ROUNDS) / "history/pseudo_labels.parquet"
    labels = records.to_frame(records.read_table(path, records.PSEUDO_LABELS)).set_index(["round", "sent_id"])
    sizes = labels[["height", "width"]].to_numpy().tolist()
    rles = [{"size": size, "counts": counts} for size, counts in zip(sizes, labels["rle_counts"], strict=True)]
    coco = dict(zip(labels.index, rles, strict=True))
    agreement = {i: coco_mask.iou([coco[1, i]], [coco[2, i]], [0]).item() for number, i in coco if number == 1}
    kinds = [case["data-kind"] for case in Page(text).all("article")]
    changed = [sent_id for kind, sent_id in zip(kinds, sent_ids(text), strict=True) if kind == "changed-labels"]
    most = sorted(agreement, key=agreement.__getitem__)[:CASES]  # a tenth of the labels is less than CASES
    assert changed
    assert set(changed) <= set(most)
    assert [agreement[sent_id] for sent_id in changed] == sorted(agreement[sent_id] for sent_id in changed)
    alts = [picture["alt"].split(":")[0] for picture in Page(text).all("img")]
    start = 6 * kinds.index("changed-labels")
    shown = ["image", "prior", "round 1", "round 2", "round 1 against truth", "round 2 against truth"]
    assert [alt.split(" “")[0] for alt in alts[start : start + 6]] == shown


def test_every_form_field_has_a_name_and_a_label(text: str) -> None:
    form = text[text.index("<form") : text.index("</form>")]
    fields = re.findall(r"<label>([^<]+)<(select|input)[^>]* name=\"(\w+)\"", form)
    assert [name for _, _, name in fields] == ["kind", "split", "style", "size", "text"]
    assert all(label.strip() for label, _, _ in fields)
    status = next(attributes for _, attributes in Page(text).tags if attributes.get("id") == "shown")
    assert (status["role"], status["aria-live"]) == ("status", "polite")


def test_ids_are_unique_and_links_have_targets(text: str) -> None:
    page = Page(text)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_scores_match_the_metrics_file(text: str, run_folder: Path) -> None:
    metrics = json.loads((run_folder / "metrics/evaluate.json").read_text())
    rows = Page(text).rows
    scores = ["miou", "oiou", "pr50", "pr60", "pr70", "pr80", "pr90"]
    for split in ("val", "test"):
        gain = metrics[f"{split}_miou"] - metrics[f"{split}_supervised_miou"]
        assert ["round 2", *(f"{metrics[f'{split}_{name}']:.2f}" for name in scores), f"{gain:+.2f}"] in rows
    for name in (
        "prior only",
        "supervised only",
        "round 0 (warm-up)",
        "round 1",
        "round 2, no prior",
        "distilled, no prior",
    ):
        assert sum(row[0] == name and len(row) == 9 for row in rows) == 2
    for name, shown in (("coverage", "accepted"), ("miou_accepted", "mIoU, accepted")):
        assert [shown, *(f"{metrics[f'pseudo_round_{number}_{name}']:.2f}" for number in (1, 2))] in rows


def test_report_stage_names_its_missing_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "--round", "1"])
    with pytest.raises(ArtifactError, match=r"metrics/evaluate.json: not found"):
        report.main()


def test_equal_runs_give_equal_bytes(text: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("report", "plots"):
        shutil.rmtree(run_folder / name)
    (run_folder / records.METRICS_PATH).unlink()
    assert make_report(run_folder, monkeypatch) == text


def test_report_without_rounds_has_no_pseudo_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, rounds=0)
    page = Page(make_report(tmp_path, monkeypatch, rounds=0))
    sections = [section["id"] for section in page.all("section")]
    assert sections[:4] == ["scores", "errors", "training", "cases"]
    assert not set(sections) & {"labels", "accepted", "rejected", "changed-labels", "changed"}
    assert not any(caption.startswith("round 0 to") for caption in page.text)


def test_shows_pseudo_labels_without_ground_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert ["accepted", f"{coverage:.2f}"] in page.rows
    assert ["AUROC", "n/a"] in page.rows
    assert {case["data-size"] for case in page.all("article") if case["data-split"] == "train"} == {"unknown"}


def test_draws_a_mask_prior_and_not_its_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prior is the left half of its image, so the one line is in the middle of the picture."""
    write_run(tmp_path, rounds=0)
    path = tmp_path / records.PRIORS_PATH
    rows = records.read_table(path, records.PRIORS).to_pylist()
    left = np.zeros((48, 64), bool)
    left[:, :32] = True
    rows = [row | {"mask": encode_rle(left), "bbox": [40, 10, 60, 40]} for row in rows]
    records.write_table(records.make_table(rows, records.PRIORS), path, records.PRIORS)
    page = Page(make_report(tmp_path, monkeypatch, rounds=0))
    pictures = [picture["src"] for picture in page.all("img") if picture["alt"].startswith("prior")]
    assert pictures
    for source in pictures:
        panel = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))), int)
        yellow = (panel[..., 0] > 200) & (panel[..., 1] > 160) & (panel[..., 2] < 110)
        inside = yellow[10:-10, 10:-10].any(axis=0).nonzero()[0] + 10  # the outline also follows the picture's border
        assert np.abs(inside - PANEL_PX / 2).max() <= 3


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"mask": 0, "box": 4, "point": 0}, "box"),
        ({"mask": 4, "box": 0, "point": 0}, "the priors' masks"),
        ({"mask": 3, "box": 0, "point": 1}, "the priors' masks, and box for priors without a mask"),
    ],
)
def test_names_what_the_proposals_are(
    counts: dict[str, int], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, rounds=0)
    path = tmp_path / records.PRIORS_METRICS_PATH
    records.write_metrics(json.loads(path.read_text()) | counts, path)
    page = html.unescape(make_report(tmp_path, monkeypatch, rounds=0))
    assert f"<dt>proposals</dt><dd>{shown}</dd>" in page


def test_spreads_cases_over_the_value_range_and_over_images() -> None:
    sent_id = pd.Series(range(20))
    rows = pd.DataFrame({"sent_id": sent_id, "image_id": sent_id // 2, "iou": sent_id // 2 / 10})
    chosen = spread(rows.sample(frac=1, random_state=3), "iou", 4)
    assert chosen["image_id"].tolist() == [0, 3, 6, 9]
    assert chosen.equals(spread(rows, "iou", 4))
    assert {sent_id % 2 for sent_id in spread(rows, "iou", 10)["sent_id"]} == {0, 1}  # not always an image's first
    assert len(spread(rows, "iou", 50)) == 10
    assert spread(rows.iloc[:0], "iou", 3).empty
    assert len(spread(rows, "iou", 1)) == 1


PROBE = """<script>addEventListener("load", () => setTimeout(() => Object.assign(document.body.dataset, {
    shown: [...document.querySelectorAll(".case")].filter(one => one.checkVisibility()).length,
    said: document.getElementById("shown").textContent,
    sections: [...document.querySelectorAll(".gallery")].filter(one => one.checkVisibility()).map(one => one.id).join(),
    form: document.getElementById("filter").checkVisibility(),
    address: location.hash,
    broken: [...document.images].filter(one => !one.naturalWidth).length,
    scrolls: document.documentElement.scrollWidth > document.documentElement.clientWidth}), 500))</script>"""
"""Records what a reader sees in the browser as attributes of the body."""

TYPE = """const field = document.querySelector("[name=text]");
    field.value = WORDS;
    for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {bubbles: true}));"""
"""What a browser does when a reader types into the search field."""

needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed: the page is not opened"
)


@needs_browser
def test_browser_opens_the_page_without_errors(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    opened = open_in_chromium(tmp_path / "page.html", tmp_path)
    assert "CONSOLE" not in opened.stderr  # neither errors nor violations of the security policy
    cases = len(Page(text).all("article"))
    assert f">{cases} of {cases} cases shown<" in opened.stdout  # the script ran under the page's policy


@needs_browser
def test_phone_shows_every_picture_without_horizontal_scrolling(text: str, tmp_path: Path) -> None:
    seen = look(text, tmp_path)
    cases = len(Page(text).all("article"))
    assert seen["shown"] == str(cases)
    assert (seen["broken"], seen["scrolls"], seen["form"]) == ("0", "false", "true")


@needs_browser
def test_url_fragment_filters_the_cases(text: str, tmp_path: Path) -> None:
    cases = Page(text).all("article")
    fitting = [case for case in cases if (case["data-kind"], case["data-style"]) == ("accepted", "long")]
    assert 0 < len(fitting) < CASES  # neither condition alone is enough
    seen = look(text, tmp_path, "#kind=accepted&style=long")
    assert seen["said"] == f"{len(fitting)} of {len(cases)} cases shown"
    assert seen["shown"] == str(len(fitting))
    assert seen["sections"] == "accepted"


@needs_browser
def test_search_text_filters_the_cases_and_updates_the_url(text: str, tmp_path: Path) -> None:
    words = '<SCRIPT>alert("pwned")'  # from TRAP, in other case: as harmless in the field as in the page
    typed = json.dumps(words).replace("<", "\\u003c")
    seen = look(text, tmp_path, "#scores", TYPE.replace("WORDS", typed))
    traps = text.count('<span class="sentence">&lt;script')
    assert 0 < traps < len(Page(text).all("article"))
    assert seen["shown"] == str(traps)
    assert parse_qs(seen["address"].removeprefix("#")) == {"text": [words]}


@needs_browser
def test_only_a_link_to_a_hidden_section_clears_the_filter(text: str, tmp_path: Path) -> None:
    cases = str(len(Page(text).all("article")))
    follow = "document.querySelector(`a[href='#%s']`).click()"
    assert look(text, tmp_path, "#kind=accepted", follow % "rejected")["shown"] == cases
    assert look(text, tmp_path, "#kind=accepted", follow % "scores")["sections"] == "accepted"


@needs_browser
def test_clear_button_shows_all_cases(text: str, tmp_path: Path) -> None:
    seen = look(text, tmp_path, "#kind=accepted&text=nonsense", "document.getElementById('clear').click()")
    assert seen["shown"] == str(len(Page(text).all("article")))
    assert seen["address"] == "#cases"


@needs_browser
def test_unknown_filter_values_hide_nothing(text: str, tmp_path: Path) -> None:
    seen = look(text, tmp_path, "#kind=nonsense&colour=red&length=3")
    assert seen["shown"] == str(len(Page(text).all("article")))


@needs_browser
def test_page_without_script_shows_all_cases_and_hides_the_form(text: str, tmp_path: Path) -> None:
    still = re.sub(r'<script type="module">.*?</script>', "", text, flags=re.DOTALL)
    seen = look(still, tmp_path, "#kind=changed")
    assert seen["shown"] == str(len(Page(text).all("article")))
    assert seen["form"] == "false"


def look(text: str, folder: Path, address: str = "", act: str = "") -> dict[str, str]:
    """What a reader sees of the page on a phone, after the script `act`."""
    # The page forbids foreign scripts, so the test scripts go into a copy without that policy.
    probes = f"<script>addEventListener('load', () => {{{act}}})</script>" + PROBE
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", probes + "</body>")
    (folder / "probed.html").write_text(copy, encoding="utf-8")
    opened = open_in_chromium(folder / "probed.html", folder, address)
    assert "CONSOLE" not in opened.stderr
    body = Page(re.sub(r"<(svg|img).*?>", "", opened.stdout)).all("body")[0]
    return {name.removeprefix("data-"): value for name, value in body.items()}


def open_in_chromium(page: Path, folder: Path, address: str = "") -> "subprocess.CompletedProcess[str]":
    quiet = ["background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    size = ["--window-size=390,900", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command = ["chromium", *flags, *size, "--virtual-time-budget=5000", "--dump-dom", page.as_uri() + address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
