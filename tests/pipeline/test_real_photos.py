"""Real JPEGs, polygons, sentences and recorded responses through every stage."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from bench.real_photos import PARAMS, ROLES, add_photos, score_prior, set_params
from bench.tiny_project import executed, make_project

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("photos")]

FEW_STEPS = {
    "train": {"batch_size": 4, "log_every": 2, "engine": {"device": "cpu"}},
    "warmup": {"steps": 4},
    "select": {"fold_steps": 2, "method": "all"},  # in so few steps `reinforce` learns to reject every label
    "retrain": {"steps": 4},
    "distill": {"steps": 4},
}


@pytest.fixture
def project(real_data, tmp_path):
    project = make_project(tmp_path / "project", {})
    add_photos(project.folder, real_data)
    set_params(project.folder, PARAMS | FEW_STEPS)
    return project


def box_iou_with_mask(box, mask: np.ndarray) -> float:
    """IoU of a mask and the pixels whose centers lie in the box, by plain counting."""
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
    return float((inside & mask).sum() / (inside | mask).sum())


def test_scores_recorded_boxes_of_ten_sentences_as_masks(project, real_data):
    for stage in ("ingest", "split", "query", "priors"):
        project.run("python", "-m", f"stages.{stage}")
    box, count = score_prior(project.folder, "box")
    grabcut, _ = score_prior(project.folder, "grabcut")
    assert count == 10

    # The reference reads the published files directly.
    folder = real_data / "res_mini" / "refcoco"
    refs = {ref["ref_id"]: ref for ref in pickle.loads((folder / "refs(unc).p").read_bytes())}
    annotations = {row["id"]: row for row in json.loads((folder / "instances.json").read_text())["annotations"]}
    lines = (real_data / "mllm_outputs" / "qwen25vl_refcoco_testA.jsonl").read_text().splitlines()
    ious = []
    for response in (response for response in map(json.loads, lines) if response["ref_id"] in refs):
        segmentation = annotations[refs[response["ref_id"]]["ann_id"]]["segmentation"]
        if isinstance(segmentation, list):
            rles = coco_mask.frPyObjects(segmentation, response["height"], response["width"])
            segmentation = coco_mask.merge(rles)
        elif isinstance(segmentation["counts"], list):
            segmentation = coco_mask.frPyObjects(segmentation, response["height"], response["width"])
        mask = coco_mask.decode(segmentation).astype(bool)
        ious.append(box_iou_with_mask(response["pred_box_xyxy"], mask) if response["pred_box_xyxy"] else 0.0)
    assert len(ious) == 10
    # A proposal map has 48 cells per side, so its borders lie within one cell of the box.
    assert box["miou"] == pytest.approx(100 * np.mean(ious), abs=2)
    assert box["miou"] > 40
    assert grabcut["miou"] > box["miou"] - 5  # GrabCut does not break boxes on real photos


def test_every_stage_runs_on_real_photos(project):
    output = project.run("dvc", "repro")
    ran = executed(output)
    assert "accepted nothing" not in output  # training used real pseudo-labels
    assert "refshapes" not in ran
    assert {"ingest", "split", "query", "priors", "proposals", "warmup", "crossfit-0"} <= set(ran)
    assert {"select@1", "retrain@1", "predict@1", "distill", "predict-distilled", "evaluate", "report"} <= set(ran)
    metrics = json.loads(project.read("metrics/evaluate.json"))
    assert metrics["n_testA"] == 9  # three refs with three sentences each
    for method in ("prior", "supervised", "round_0", "round_1", "distilled"):
        assert 0 <= metrics[f"testA_{method}_miou"] <= 100
    assert "dataset_version" not in metrics

    split = pq.read_table(project.folder / "data/split/split.parquet").to_pandas()
    images = pq.read_table(project.folder / "data/index/refs.parquet").to_pandas()[["sent_id", "image_id"]]
    by_role = split.merge(images, on="sent_id").groupby("role")["image_id"].unique()
    for role, listed in zip(("labeled", "unlabeled", "eval"), ROLES.values(), strict=True):
        assert sorted(by_role[role]) == sorted(listed)
    priors = pq.read_table(project.folder / "data/priors/priors.parquet").to_pandas()
    assert (priors["status"] == "ok").sum() == 9  # ten responses, one without a box
    assert len(priors) == len(split) == 59

    page = project.read("report/index.html").decode()
    assert "<img" in page
    assert len(page) > 100_000  # the page embeds photos
    with Image.open(project.folder / "data/photos/images/train2014/COCO_train2014_000000000154.jpg") as image:
        assert image.size[0] > 256  # larger than the network's input
