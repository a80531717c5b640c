"""A tiny project after its first run. Tests must leave it unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bench.tiny_project import TINY, Project, make_project


@dataclass(frozen=True)
class FirstRun:
    """A project after `dvc repro`, committed."""

    project: Project
    output: str


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    project = make_project(tmp_path_factory.mktemp("pipeline") / "project", TINY)
    output = project.run("dvc", "repro")
    project.commit()
    return FirstRun(project, output)
