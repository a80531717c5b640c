from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prior_tables import Index, random_scenes, refcoco_testa
from pycocotools import mask as coco_mask

from l2l_core.errors import InputError
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.error_model import ERROR_MODELS
from l2l_core.mllm.prompt import response_schema
from l2l_core.mllm.simulated import SimulatedBackend, describe_sentence, make_truth, preset_coord_space
from l2l_core.priors.parse import ParsedPrior, parse_response

EDGES = (0.0, 0.05, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95)
# Measured on real responses: share without a box, share with IoU >= 0.5, share of wrong objects, shares by IoU bin.
# The share of wrong objects is measured for the first two models and assumed for the last.
MEASURED = {
    "qwen2.5-vl-7b": (0.023, 0.903, 0.032, (0.021, 0.016, 0.037, 0.065, 0.084, 0.248, 0.335, 0.171)),
    "internvl2.5-8b": (0.010, 0.894, 0.034, (0.030, 0.021, 0.045, 0.076, 0.084, 0.239, 0.279, 0.216)),
    "llava-1.5-7b": (0.000, 0.489, 0.100, (0.126, 0.068, 0.316, 0.311, 0.114, 0.047, 0.011, 0.006)),
}


def backend(preset: str, index: Index, seed: int = 0) -> SimulatedBackend:
    return SimulatedBackend(preset, preset_coord_space(preset, "auto"), seed, make_truth(index.refs, index.objects))


def questions(index: Index, samples: int = 1) -> list[Question]:
    known = index.refs.merge(index.images, on="image_id")
    columns = (known[name].tolist() for name in ("sent_id", "file_name", "height", "width", "sentence"))
    return [
        Question(sent_id, sample, file_name, (height, width), sentence)
        for sent_id, file_name, height, width, sentence in zip(*columns, strict=True)
        for sample in range(samples)
    ]


def parse(queries: list[Question], responses: list[RawResponse]) -> list[ParsedPrior]:
    return [
        parse_response(response.raw_text, response.coord_space, question.image_hw, response.input_hw)
        for question, response in zip(queries, responses, strict=True)
    ]


def coco_iou(box: object, others: object) -> np.ndarray:
    """IoU of one box with several, x1 y1 x2 y2, by pycocotools."""
    one, many = (np.atleast_2d(np.asarray(boxes, dtype=np.float64)) for boxes in (box, others))
    to_xywh = [np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1) for boxes in (one, many)]
    return np.asarray(coco_mask.iou(*to_xywh, [0] * len(many)))[0]


def judge(index: Index, queries: list[Question], priors: list[ParsedPrior]) -> pd.DataFrame:
    """IoU with the true box (NaN without one), and the ann_id of the object marked instead (-1: none)."""
    here: dict[int, list[tuple[int, list[float]]]] = {}
    for image_id, ann_id, box in index.objects[["image_id", "ann_id", "bbox"]].itertuples(index=False):
        here.setdefault(image_id, []).append((ann_id, box))
    truth = {row.sent_id: row for row in index.refs[["sent_id", "image_id", "ann_id", "bbox"]].itertuples(index=False)}
    rows = []
    for question, prior in zip(queries, priors, strict=True):
        if prior.bbox is None:
            rows.append((np.nan, -1, np.nan))
            continue
        ref = truth[question.sent_id]
        others = [item for item in here.get(ref.image_id, []) if item[0] != ref.ann_id]
        iou, *other_ious = coco_iou(prior.bbox, [ref.bbox, *(box for _, box in others)])
        marks_other = iou < 0.5 and other_ious and max(other_ious) >= 0.5
        rows.append((iou, others[int(np.argmax(other_ious))][0] if marks_other else -1, prior.score))
    return pd.DataFrame(rows, columns=["iou", "wrong_ann_id", "score"])


def judged(preset: str, index: Index) -> pd.DataFrame:
    queries = questions(index)
    return judge(index, queries, parse(queries, backend(preset, index).query(queries)))


@pytest.fixture(scope="module")
def scenes() -> Index:
    return random_scenes(images=2500)  # 5,000 sentences


@pytest.fixture(scope="module")
def llava(scenes: Index) -> pd.DataFrame:
    return judged("llava-1.5-7b", scenes)


def assert_measured(preset: str, seen: pd.DataFrame) -> None:
    """Checks that every rate is within 2 points of the measured one."""
    no_box, acc, wrong, histogram = MEASURED[preset]
    counts, _ = np.histogram(seen["iou"].dropna(), (*EDGES, 1.0))
    assert seen["iou"].isna().mean() == pytest.approx(no_box, abs=0.02)
    assert (seen["iou"] >= 0.5).mean() == pytest.approx(acc, abs=0.02)
    assert (seen["wrong_ann_id"] >= 0).mean() == pytest.approx(wrong, abs=0.02)
    assert counts / len(seen) == pytest.approx(histogram, abs=0.02)


@pytest.mark.parametrize("preset", MEASURED)
def test_presets_reproduce_the_measured_rates(preset: str, scenes: Index) -> None:
    queries = questions(scenes)
    priors = parse(queries, backend(preset, scenes).query(queries))
    assert len(priors) == 5000
    assert {prior.status for prior in priors} <= {"ok", "empty"}
    assert_measured(preset, judge(scenes, queries, priors))


@pytest.mark.parametrize("preset", MEASURED)
def test_presets_reproduce_the_rates_without_overlapping_objects(preset: str, scenes: Index) -> None:
    """When no two objects touch, a wrong object has IoU 0, so only the lowest bin can hold one."""
    lattice = [[8.0 * (ann_id % 10), 8.0, 8.0 * (ann_id % 10) + 7, 15.0] for ann_id in scenes.objects["ann_id"]]
    objects = scenes.objects.assign(bbox=lattice)
    refs = scenes.refs.drop(columns="bbox").merge(objects[["ann_id", "bbox"]], on="ann_id")
    assert_measured(preset, judged(preset, Index(scenes.images, refs, objects)))


def test_a_lone_object_is_never_confused_with_another(scenes: Index) -> None:
    refs = scenes.refs.iloc[::2]
    seen = judged(
        "llava-1.5-7b", Index(scenes.images, refs, scenes.objects[scenes.objects["ann_id"].isin(refs["ann_id"])])
    )
    assert (seen["wrong_ann_id"] == -1).all()
    assert (seen["iou"] < 0.5).mean() == pytest.approx(0.510, abs=0.03)


def test_iou_rates_hold_for_objects_from_four_pixels_to_the_whole_image() -> None:
    rng = np.random.default_rng(0)
    scenes = random_scenes(images=1000, seed=1)
    sides = rng.choice([4.0, 12.0, 60.0, 96.0], size=(len(scenes.refs), 2))
    corners = rng.uniform(0, 1, sides.shape) * (96 - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).tolist()
    images = scenes.images.assign(height=96, width=96)
    seen = judged("llava-1.5-7b", Index(images, scenes.refs.assign(bbox=boxes), scenes.objects.iloc[:0]))
    counts, _ = np.histogram(seen["iou"].dropna(), (*EDGES, 1.0))
    assert counts / len(seen) == pytest.approx(MEASURED["llava-1.5-7b"][3], abs=0.03)


def test_wrong_objects_prefer_the_same_category(scenes: Index, llava: pd.DataFrame) -> None:
    """Two of the five other objects share the target's category: 0.4 by chance, 8 / (8 + 3) = 0.73 expected."""
    category = scenes.objects.set_index("ann_id")["category"]
    is_wrong = llava["wrong_ann_id"] >= 0
    taken = category.loc[llava.loc[is_wrong, "wrong_ann_id"]].to_numpy()
    meant = scenes.refs.loc[is_wrong.to_numpy(), "category"].to_numpy()
    assert 0.63 < np.mean(taken == meant) < 0.83


def test_confidence_is_only_weakly_informative(llava: pd.DataFrame) -> None:
    right, wrong = (llava.loc[chosen, "score"].to_numpy() for chosen in (llava["iou"] >= 0.5, llava["iou"] < 0.5))
    auroc = np.mean((right[:, None] > wrong) + 0.5 * (right[:, None] == wrong))
    assert 0.55 < auroc < 0.66
    assert llava["score"].dropna().between(0.5, 1.0).all()


@pytest.mark.parametrize("preset", MEASURED)
def test_a_response_depends_only_on_its_question(preset: str, scenes: Index) -> None:
    queries = questions(scenes, samples=2)[:400]
    responses = backend(preset, scenes).query(queries)
    assert backend(preset, scenes).query(queries[::-1]) == responses[::-1]
    some = backend(preset, scenes)
    assert some.query(queries[7:9]) == responses[7:9]
    assert some.query([]) == []
    assert some.query(queries) == responses
    shuffled = Index(
        scenes.images, scenes.refs.sample(frac=1, random_state=1), scenes.objects.sample(frac=1, random_state=2)
    )
    assert backend(preset, shuffled).query(queries) == responses
    other_seed = backend(preset, scenes, seed=1).query(queries)
    assert sum(a.raw_text == b.raw_text for a, b in zip(responses, other_seed, strict=True)) < 40
    samples = [(responses[row].raw_text, responses[row + 1].raw_text) for row in range(0, 400, 2)]
    assert sum(a == b for a, b in samples) < 20


def test_responses_conform_to_the_prompt_schema(scenes: Index) -> None:
    for preset in MEASURED:
        queries = questions(scenes)[:500]
        responses = backend(preset, scenes).query(queries)
        schema = response_schema("box-1", responses[0].coord_space)
        properties = schema["properties"]
        assert isinstance(properties, dict)
        number = properties["bbox"]["anyOf"][0]["items"]
        for response in responses:
            said = json.loads(response.raw_text)
            assert list(said) == schema["required"]
            assert len(said["target"]) <= properties["target"]["maxLength"]
            assert len(said["attributes"]) <= properties["attributes"]["maxItems"]
            assert len(said["relation"]) <= properties["relation"]["maxLength"]
            assert 0 <= said["confidence"] <= 1
            assert (said["bbox"] is None) == (not said["found"])
            assert all(number["minimum"] <= value <= number["maximum"] for value in said["bbox"] or [])


def test_responses_use_the_configured_coordinate_space(scenes: Index) -> None:
    """Qwen2.5-VL resizes 640 x 480 to 644 x 476, which scales its boxes by the same factors."""
    row = next(question for question in questions(scenes) if question.image_hw == (480, 640))
    written = {}
    for space in ("pixel", "resized_pixel", "norm1000", "unit"):
        simulated = SimulatedBackend("llava-1.5-7b", space, 0, make_truth(scenes.refs, scenes.objects))
        response = simulated.query([row])[0]
        assert response.coord_space == space
        assert response.input_hw == ((476, 644) if space == "resized_pixel" else (480, 640))
        written[space] = np.array(json.loads(response.raw_text)["bbox"])
    assert written["resized_pixel"] == pytest.approx(written["pixel"] * np.tile([644 / 640, 476 / 480], 2), abs=0.01)
    assert written["norm1000"] == pytest.approx(written["pixel"] / np.tile([0.64, 0.48], 2), abs=0.01)
    assert written["unit"] == pytest.approx(written["norm1000"] / 1000, abs=1e-5)


def test_missing_boxes_error_names_the_remedy(scenes: Index) -> None:
    refs = scenes.refs.copy()
    refs.at[5, "bbox"] = None
    with pytest.raises(InputError, match=r"1 of 5000 .*sent_id 21\).*priors\.backend to replay"):
        make_truth(refs, scenes.objects)


@pytest.mark.parametrize(
    ("sentence", "target", "attributes", "relation"),
    [
        ("white car left of the bus", "car", ["white"], "left of the bus"),
        ("left man", "man", [], "left"),
        ("The big dotted heart that is not orange", "heart", ["big", "dotted"], "that is not orange"),
        ("leftmost", "leftmost", [], ""),
        ("top right", "right", [], "top"),
        ("?!", "", [], ""),
    ],
)
def test_describe_sentence_splits_target_attributes_and_relation(
    sentence: str, target: str, attributes: list[str], relation: str
) -> None:
    assert describe_sentence(sentence) == (target, attributes, relation)


@pytest.mark.parametrize(("preset", "file"), [("qwen2.5-vl-7b", "qwen25vl"), ("internvl2.5-8b", "internvl")])
def test_presets_match_real_responses(preset: str, file: str, real_data: Path) -> None:
    """Recounts the wrong objects in 1,975 real responses and simulates responses for the same photos."""
    index = refcoco_testa(real_data)
    first = index.refs.drop_duplicates("ref_id").set_index("ref_id")["sent_id"]
    lines = (real_data / f"mllm_outputs/{file}_refcoco_testA.jsonl").read_text().splitlines()
    queries, priors = [], []
    for row in map(json.loads, lines):
        box = row["pred_box_xyxy"]
        clipped = None if box is None else tuple(np.clip(box, 0, [row["width"], row["height"]] * 2).tolist())
        queries.append(Question(int(first[row["ref_id"]]), 0, "", (row["height"], row["width"]), ""))
        priors.append(ParsedPrior("ok", bbox=clipped))
    real = judge(index, queries, priors)
    assert len(real) == 1975
    assert (real["wrong_ann_id"] >= 0).mean() == pytest.approx(MEASURED[preset][2], abs=0.001)
    for place, (low, high) in enumerate(pairwise(EDGES[:4])):
        there = real.loc[(real["iou"] >= low) & (real["iou"] < high), "wrong_ann_id"]
        assert (there >= 0).mean() == pytest.approx(ERROR_MODELS[preset].wrong_object_share[place], abs=0.001)

    assert_measured(preset, judged(preset, index))
