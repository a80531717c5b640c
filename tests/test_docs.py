"""README.md and docs/ keep what they promise: links, commands, parameters and tables; tracked files stay portable."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

from bench import (
    campaigns,
    data_workers,
    default_run,
    docs,
    imports,
    label_efficiency,
    label_efficiency_page,
    photo_priors,
    priors,
    priors_engines,
    refshapes,
    rewards,
    sam,
    scale,
    selected,
    vlm,
    waiting,
    workers,
)
from l2l_core.config import load_params
from l2l_core.workers.chunks import check_gpus
from tools import reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "vlm" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]

MAX_TRACKED_BYTES = 1_000_000
WEIGHTS, MAX_WEIGHTS_BYTES = "vlm/refshapes-vlm/model.safetensors", 12_000_000
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MODULE = re.compile(r"python -m (\w+(?:\.\w+)*)")
OVERRIDES = re.compile(r"(?:-S\s+[^\s`]+\s*)+")  # those of one command
ELSEWHERE = {"vllm.entrypoints.openai.api_server"}  # run by make test-vllm, in an environment of its own
CODE_PATH = re.compile(r"`((?:l2l_core|stages|tests|bench|docs)/[\w./-]+?\.(?:py|yaml|md))`")
ABSOLUTE = re.compile(r"(?<![\w.}>~/-])/(?:home|root|work|tmp|Users|mnt|opt|private)/\w|\b[A-Z]:\\\\?Users\b")


def tracked_files() -> list[Path]:
    try:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a Git checkout: nothing is tracked")
    return [path for name in names.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if not re.match(r"https?:|mailto:", link)]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in CODE_PATH.findall(text) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_modules_can_be_run(page: Path) -> None:
    for name in set(MODULE.findall(page.read_text(encoding="utf-8"))) - ELSEWHERE:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"python -m {name}"
        if spec.submodule_search_locations is not None:  # a package
            assert importlib.util.find_spec(f"{name}.__main__") is not None, f"python -m {name}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "reference"], ids=lambda page: page.name
)
def test_overrides_are_parameters_that_parse(page: Path, tmp_path: Path) -> None:
    """As `dvc exp run -S` applies them, each of a sweep; an unknown key or a value that is not allowed raises."""
    for command in OVERRIDES.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        for overrides in get_hydra_sweeps({"params.yaml": shlex.split(command)[1::2]}):
            file = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
            apply_overrides(str(file), overrides["params.yaml"])
            load_params(file)


def test_commands_for_gpus_give_each_worker_of_the_cluster_one(tmp_path: Path) -> None:
    rows = re.findall(r"^\|[^|]*GPU[^|]*\|.*?(-S [^`]*)`", (ROOT / "docs/scale.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) >= 4
    for given in rows:
        file = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
        apply_overrides(str(file), shlex.split(given)[1::2])
        check_gpus(load_params(file).cluster, "cuda")


def test_the_readme_names_overrides_and_commands() -> None:
    """The patterns above find what they look for."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(OVERRIDES.findall(text)) >= 5
    assert "bench.label_efficiency" in MODULE.findall(text)
    assert "docs/data.md" in LINK.findall(text)
    assert ABSOLUTE.search("see /" + "home/me/x")


@pytest.mark.parametrize(
    "name",
    [
        "refshapes",
        "responses",
        "proposals",
        "engines",
        "rewards",
        "waiting",
        "imports",
        "photo_priors",
        "sam",
        "scale",
        "data_workers",
        "workers",
        "selected",
    ],
)
def test_tables_are_those_of_the_stored_results(name: str) -> None:
    """What stands in the document is what its bench makes of bench/results."""
    bench = {
        "refshapes": refshapes,
        "responses": priors,
        "proposals": priors,
        "engines": priors_engines,
        "rewards": rewards,
        "waiting": waiting,
        "imports": imports,
        "photo_priors": photo_priors,
        "sam": sam,
        "scale": scale,
        "data_workers": data_workers,
        "workers": workers,
        "selected": selected,
    }[name]
    if not bench.RESULTS.exists():
        pytest.skip(f"{bench.RESULTS.relative_to(ROOT)} does not exist: run python -m {bench.__name__}")
    match name:
        case "refshapes":
            document, text = refshapes.DOCUMENT, refshapes.table(pd.read_json(refshapes.RESULTS, lines=True))
        case "rewards":
            document, text = rewards.DOCUMENT, rewards.table(pd.read_json(rewards.RESULTS, lines=True))
        case "responses" | "proposals":
            rows = [json.loads(line) for line in priors.RESULTS.read_text(encoding="utf-8").splitlines()]
            make = priors.responses_table if name == "responses" else priors.proposals_table
            document, text = priors.DOCUMENT, make(rows)
        case _:
            rows = [json.loads(line) for line in bench.RESULTS.read_text(encoding="utf-8").splitlines()]
            document, text = bench.DOCUMENT, bench.table(rows)
    assert docs.get(document, name) == text


@pytest.mark.parametrize("name", ["cli.md", "parameters.md", "python.md", "artifacts.md"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    assert (reference.FOLDER / name).read_text(encoding="utf-8") == reference.pages()[name], "python -m tools.reference"


def test_every_page_is_in_the_navigation_of_the_website() -> None:
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:])


def test_the_model_card_says_what_was_measured() -> None:
    rows = [json.loads(line) for line in vlm.RESULTS.read_text(encoding="utf-8").splitlines()]
    for name, make in vlm.PARTS.items():
        assert docs.get(vlm.DOCUMENT, name) == make(rows)


def test_times_are_those_of_the_stored_run() -> None:
    rows = [json.loads(line) for line in default_run.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert docs.get(default_run.README, default_run.MARK) == default_run.line(rows)
    assert docs.get(default_run.DOCUMENT, default_run.MARK) == default_run.table(rows)


def test_campaigns_are_those_of_the_stored_rows() -> None:
    assert docs.get(campaigns.DOCUMENT, campaigns.MARK) == campaigns.table(campaigns.stored())


def test_results_are_those_of_the_stored_runs() -> None:
    path = label_efficiency.RESULTS
    changes = ["git", "status", "--porcelain", "--", path]
    if not path.exists() or subprocess.run(changes, cwd=ROOT, capture_output=True).stdout:
        pytest.skip(f"{path.relative_to(ROOT)} is not there or being written: python -m bench.label_efficiency --table")
    rows = pd.DataFrame(label_efficiency.stored(path))
    page = label_efficiency_page
    assert docs.get(page.README, page.MARK) == page.short(rows)
    assert docs.get(page.DOCUMENT, page.MARK) == page.page(rows)


def test_results_were_measured_at_commits_of_this_history() -> None:
    """Otherwise nobody could measure them again."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("not a Git checkout with its whole history")
    files = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    commits = {line["commit"] for line in lines if "commit" in line}
    assert commits
    assert not [commit for commit in commits if git("merge-base", "--is-ancestor", commit, "HEAD").returncode]


def test_tracked_text_has_no_absolute_paths() -> None:
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not text
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, start=1)
            if ABSOLUTE.search(line)
        ]
    assert not found


def test_nothing_large_is_tracked() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files()}
    assert sizes.pop(WEIGHTS, 0) < MAX_WEIGHTS_BYTES
    assert {name: size for name, size in sizes.items() if size > MAX_TRACKED_BYTES} == {}
