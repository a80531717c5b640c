"""Instance masks of photographs without sentences, from the import to labels and masks: every step of a user's path."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from bench.tiny_project import executed, make_project
from l2l_core.model.packaged import PACKAGED

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.xdist_group("own_photos"),
    pytest.mark.skipif(
        not all(find_spec(package) for _, package, _ in PACKAGED.values()), reason="needs the extra small: make small"
    ),
]

TRAINED, HELD_OUT = 10, 3
FEW_STEPS = {
    "model": {"preset": "small"},
    "train": {"batch_size": 4, "log_every": 1, "engine": {"device": "cpu"}},
    "warmup": {"steps": 2},
    "select": {"fold_steps": 1, "method": "all"},  # in so few steps `reinforce` learns to reject every label
    "retrain": {"steps": 2},
    "distill": {"steps": 2},
    "evaluate": {"batch_size": 8},
    "report": {"cases": 2},
}
CHANGES = ("dataset=data/mine", "priors.backend=simulated", "split.labeled_fraction=0.5", "round=1")
SET = [word for change in CHANGES for word in ("-S", change)]


def write_instances(real: Path, path: Path) -> None:
    """The first photos with a large object, some of them for val."""
    whole = json.loads((real / "instances.json").read_text(encoding="utf-8"))
    large = {row["image_id"] for row in whole["annotations"] if row["area"] > 30_000 and not row["iscrowd"]}
    images = [row for row in whole["images"] if row["id"] in large][: TRAINED + HELD_OUT]
    chosen = {row["id"] for row in images}
    images = [row | {"split": "train" if number < TRAINED else "val"} for number, row in enumerate(images)]
    annotations = [row for row in whole["annotations"] if row["image_id"] in chosen]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": whole["categories"]}))


def test_from_instance_masks_to_labels_and_predictions(real_data, tmp_path):
    real = real_data / "coco_photos"
    if not real.is_dir():
        pytest.skip("no COCO photos to test with")
    project = make_project(tmp_path / "project", FEW_STEPS)
    instances = project.folder / "instances.json"
    write_instances(real, instances)

    command = ["import", "coco", "instances.json", "--generate-sentences", "--images", str(real / "images")]
    said = project.run("l2l", *command, "--out", "data/mine")
    assert "styles: refcoco " in said
    pairs = [json.loads(line) for line in project.read("data/mine/pairs.jsonl").decode().splitlines()]
    assert {pair["split"] for pair in pairs} == {"train", "val"}

    said = project.run("l2l", "check", "--no-timing", *SET)
    assert f"{len(pairs)} sentences" in said
    assert "predict-distilled" in said
    assert "advice" not in said  # which is to use the preset `small`

    ran = executed(project.run("dvc", "exp", "run", *SET))
    assert {"ingest", "warmup", "select@1", "retrain@1", "distill", "evaluate", "report"} <= set(ran)
    metrics = json.loads(project.read("metrics/evaluate.json"))
    assert metrics["n_val"] == sum(pair["split"] == "val" for pair in pairs)
    assert 0 <= metrics["val_distilled_miou"] <= 100

    photo = next(path for path in sorted((real / "images").iterdir()) if path.suffix == ".jpg")
    said = project.run("l2l", "predict", str(photo), "the one on the left", "--out", "masks")
    assert "1 pair by data/distilled/model, 0 with a prior" in said
    (line,) = map(json.loads, project.read("masks/predictions.jsonl").decode().splitlines())
    with Image.open(photo) as image:
        assert line["segmentation"]["size"] == [image.height, image.width]
    (pair,) = [pair for pair in pairs if pair["split"] == "train"][:1]
    pair["image"] = str((project.folder / "data/mine" / pair["image"]).resolve())
    (project.folder / "one.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    said = project.run("l2l", "predict", "--pairs", "one.jsonl", "--with-priors", "--out", "with_priors")
    assert "1 pair by data/rounds/1/model" in said

    project.run("l2l", "export", "coco")
    exported = json.loads(project.read("export/pseudo_labels_round_1.json"))
    assert exported["annotations"]
    for annotation in exported["annotations"]:
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"] > 0
    assert "<img" in project.read("report/index.html").decode()
