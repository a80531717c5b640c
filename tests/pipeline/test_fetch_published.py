"""`l2l fetch NAME`: what it downloads, what it checks, and what it never modifies."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from pathlib import Path

import pytest

from bench.tiny_project import Project, executed, make_project
from l2l_core.datasets.published import SPLITS

FETCH = (sys.executable, "-m", "l2l_core", "fetch", "refcoco")
pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("fetch")]


def write_archive(path: Path) -> None:
    """Write an archive with as many refs and sentences as RefCOCO (unc); all sentences are the same."""
    refs: list[dict[str, object]] = []
    for split, rows in SPLITS["refcoco", "unc"].items():
        for number in range(rows.refs):
            count = rows.sentences // rows.refs + (number < rows.sentences % rows.refs)
            refs.append({"ref_id": len(refs), "split": split, "sentences": [{"sent": "cup"}] * count})
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("refcoco/instances.json", json.dumps({"images": [], "annotations": [], "categories": []}))
        bundle.writestr("refcoco/refs(unc).p", pickle.dumps(refs, 2))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    write_archive(folder / "refcoco.zip")
    return folder


@pytest.fixture
def project(tmp_path: Path, mirror: Path) -> Project:
    return make_project(tmp_path / "project", {"fetch": {"mirror": str(mirror)}})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetches_a_published_dataset_once(project, mirror):
    assert "data/refcoco: from " in project.run(*FETCH)
    found = contents(project.folder / "data" / "refcoco")
    assert found.keys() == {"refs(unc).p", "instances.json", "archive.json"}
    assert json.loads(found["archive.json"])["bytes"] == (mirror / "refcoco.zip").stat().st_size
    assert not (project.folder / "data" / "images").exists()  # neither photos nor other datasets
    listed = project.out("git", "status", "--porcelain", "--untracked-files=all", "data").split()
    assert "data/refcoco.dvc" in listed

    # Existing files are checked, not fetched again.
    sha256 = json.loads(found["archive.json"])["sha256"]
    project.change_params({"fetch": {"mirror": None, "sha256": {"refcoco": sha256}}})
    assert "nothing was changed" in project.run(*FETCH)
    assert contents(project.folder / "data" / "refcoco") == found

    # A copy, as used by queued experiments, gets the dataset from the cache.
    project.commit()
    project.run("rm", "-rf", "data/refcoco")
    project.run("dvc", "checkout", "data/refcoco.dvc")
    assert contents(project.folder / "data" / "refcoco") == found


def test_never_deletes_an_existing_folder(project):
    """A user's own version is accepted with a note, or refused if a checksum is set. It is kept in both cases."""
    own = project.folder / "data" / "refcoco"
    own.mkdir(parents=True)
    (own / "refs(unc).p").write_bytes(pickle.dumps([{"split": "train", "sentences": []}]))
    before = contents(own)
    amiss = "refs(unc).p: train has 1 refs with 0 sentences, published are 42,404 with 120,624"
    output = project.run(*FETCH)
    assert "not fetched by this command, nothing was changed; note: " in output
    assert amiss in output
    assert contents(own) == before
    assert not (project.folder / "data" / "refcoco.dvc").exists()

    project.change_params({"fetch": {"sha256": {"refcoco": "0" * 64}}})
    output = project.run(*FETCH, code=2)
    assert "error: data/refcoco: it exists and is not what was published" in output
    assert amiss in output
    assert contents(own) == before


def test_no_stage_downloads_data(project):
    """Neither running all DVC pipelines nor running the data folder's pipeline starts a download."""
    everything = project.run("dvc", "repro", "--dry", "--all-pipelines", code=None)  # fails at ingest: no data yet
    assert "refshapes" in executed(everything)
    assert "fetch" not in everything + project.run("dvc", "stage", "list", "--all")
    assert executed(project.run("sh", "-c", "cd data && dvc repro --dry")) == ["refshapes"]


def test_refuses_an_unpublished_dataset_name(project):
    output = project.run(*FETCH, "refcok", code=2)
    assert output == "error: fetch: got 'refcok', expected some of refcoco, refcoco+, refcocog, images\n"
    project.change_params({"dataset": "data/refcoco", "priors": {"backend": "none"}})
    output = project.run(sys.executable, "-m", "l2l_core", "check", "--no-timing", code=2)
    assert "to download it: l2l fetch refcoco images" in output
