"""Reading the history of a round."""

from pathlib import Path

import pytest
from synthetic_run import write_run

from l2l_core.artifacts import records
from l2l_core.errors import ArtifactError
from l2l_core.evaluation.history import read_history


@pytest.mark.parametrize("name", ["training.csv", "policy.csv", "predictions.parquet", "pseudo_labels.parquet"])
def test_refuses_a_history_with_a_missing_file(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, rounds=1, images_per_split=2)
    folder = tmp_path / records.round_folder(1) / "history"
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: not found"):
        read_history(folder)
