"""The check of coordinates: real recorded responses of two models, and synthetic ones of any quality."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from prior_tables import random_scenes, refcoco_testa

from l2l_core.artifacts import records
from l2l_core.config import CoordSpace
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import iou_xyxy
from l2l_core.core.masks import encode_rle
from l2l_core.errors import ConfigError
from l2l_core.mllm.backend import Question
from l2l_core.mllm.coords import COORD_SPACES, qwen_input_hw, write_boxes
from l2l_core.mllm.simulated import SimulatedBackend, make_truth
from l2l_core.priors.coord_check import check_coords, fit_coords, scores_by_space
from l2l_core.priors.parse import parse_response
from l2l_core.priors.scores import LabeledMasks

REAL = os.environ.get("L2L_REAL_DATA")
DRAWS, SENTENCES = 20, 20


@dataclass(frozen=True)
class Recorded:
    """Responses to N sentences, and the truth."""

    texts: list[str]
    true_xyxy: DoubleArray  # [N, 4]
    image_hw: NDArray[np.int64]  # [N, 2]
    input_hw: NDArray[np.int64]  # [N, 2] as recorded

    def draw(self, seed: int, count: int = SENTENCES) -> Recorded:
        rows = np.sort(np.random.default_rng(seed).choice(len(self.texts), count, replace=False))
        texts = [self.texts[row] for row in rows]
        return Recorded(texts, self.true_xyxy[rows], self.image_hw[rows], self.input_hw[rows])


def responses_of(recorded: Recorded, space: str, **changes: object) -> pa.Table:
    rows = [
        {
            "sent_id": row,
            "sample_index": 0,
            "backend": "vllm",
            "model": "m",
            "raw_text": text,
            "coord_space": space,
            "height": height,
            "width": width,
            "input_height": input_height,
            "input_width": input_width,
        }
        | changes
        for row, (text, (height, width), (input_height, input_width)) in enumerate(
            zip(recorded.texts, recorded.image_hw.tolist(), recorded.input_hw.tolist(), strict=True)
        )
    ]
    return records.make_table(rows, records.RESPONSES)


def filled(boxes: DoubleArray, image_hw: NDArray[np.int64]) -> list[bytes]:
    """Boxes as masks."""
    rle = []
    for (height, width), box in zip(image_hw.tolist(), boxes, strict=True):
        x1, y1, x2, y2 = box.round().astype(int)
        mask = np.zeros((height, width), bool)
        mask[y1:y2, x1:x2] = True
        rle.append(encode_rle(mask))
    return rle


def labels_of(recorded: Recorded, sentences_per_object: int = 1) -> LabeledMasks:
    """The true boxes as masks."""
    rle = filled(recorded.true_xyxy, recorded.image_hw)
    sent_id = np.arange(len(rle))
    return LabeledMasks(sent_id, sent_id // sentences_per_object, recorded.image_hw, rle, recorded.true_xyxy)


def problem(recorded: Recorded, space: str, **changes: object) -> str:
    """The message of the check; "" if it passes."""
    try:
        check_coords(fit_coords(responses_of(recorded, space, **changes), labels_of(recorded)))
    except ConfigError as error:
        return str(error)
    return ""


# --- real responses: at least 20 draws of 20 labeled sentences ---


def load_real(model: str) -> Recorded:
    """RefCOCO testA: the true boxes of the annotations, and the responses in the model's own notation."""
    folder = Path(str(REAL))
    refs = refcoco_testa(folder).refs.drop_duplicates("ref_id").set_index("ref_id")
    lines = (folder / "mllm_outputs" / f"{model}_refcoco_testA.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = []
    for row in rows:
        box, size = row["pred_box_xyxy"], np.array([row["width"], row["height"]])
        if box is None:
            texts.append("There is no such object.")
        elif model == "internvl":  # recorded in pixels: the model itself wrote whole thousandths
            thousandths = (np.array(box) / np.tile(size, 2) * 1000).round().astype(int).tolist()
            texts.append(f"<ref>{row['expression']}</ref><box>[{thousandths}]</box>")
        else:
            texts.append("```json\n" + json.dumps([{"bbox_2d": box, "label": row["expression"]}]) + "\n```")
    image_hw = np.array([[row["height"], row["width"]] for row in rows])
    input_hw = np.array([qwen_input_hw(*hw) for hw in image_hw.tolist()]) if model == "qwen25vl" else image_hw
    true_xyxy = np.stack(refs.loc[[row["ref_id"] for row in rows], "bbox"].tolist())
    return Recorded(texts, true_xyxy, image_hw, input_hw)


RIGHT: dict[str, CoordSpace] = {"qwen25vl": "resized_pixel", "internvl": "norm1000"}
FIT_AS_WELL = {
    "qwen25vl": {"resized_pixel", "pixel"},  # the input has nearly the image's size
    "internvl": {"norm1000", "norm999", "norm1024"},
}


@pytest.fixture(scope="module", params=RIGHT)
def model(request: pytest.FixtureRequest) -> str:
    if REAL is None:
        pytest.skip("L2L_REAL_DATA is not set")
    return str(request.param)


@pytest.fixture(scope="module")
def real(model: str) -> Recorded:
    return load_real(model)


def test_right_settings_of_real_models_pass(model: str, real: Recorded) -> None:
    for seed in range(DRAWS):
        for space in FIT_AS_WELL[model]:
            assert problem(real.draw(seed), space) == ""


def test_a_wrong_space_is_caught_on_real_responses(model: str, real: Recorded) -> None:
    wrong = [space for space in COORD_SPACES if space not in FIT_AS_WELL[model]]
    for seed in range(max(DRAWS, 2 * len(wrong))):
        message = problem(real.draw(seed), wrong[seed % len(wrong)])
        assert message.startswith("priors.coord_space: ")
        assert message.split()[1] in FIT_AS_WELL[model]


def test_swapped_axes_are_caught_on_real_responses(model: str, real: Recorded) -> None:
    for seed in range(DRAWS):
        message = problem(real.draw(seed), RIGHT[model] + "_yx")
        assert message.split()[1] in FIT_AS_WELL[model]


def test_a_wrong_image_size_is_caught_on_real_responses(model: str, real: Recorded) -> None:
    """Boxes of a smaller picture taken as pixels of the photo: 640 of 1280 pixels, or 448 x 448 of any size."""
    if model == "qwen25vl":
        taken = replace(real, true_xyxy=2 * real.true_xyxy, image_hw=2 * real.image_hw, input_hw=2 * real.image_hw)
        size = "pixels of about 640 px on the longer side"
    else:
        taken = replace(real, texts=[shrunk(text, 448 / 1000) for text in real.texts])
        size = "pixels of about 448 x 448 px"
    for seed in range(DRAWS):
        for space in ("pixel", "resized_pixel"):
            assert problem(taken.draw(seed), space).startswith(f"priors.coord_space: {size} fits")


def test_real_boxes_with_width_and_height_are_caught(model: str, real: Recorded) -> None:
    """The boxes of the models, written as x, y, width, height in pixels or thousandths."""
    sizes = zip(real.texts, real.image_hw.tolist(), real.input_hw.tolist(), strict=True)
    found = [parse_response(text, RIGHT[model], tuple(hw), tuple(input_hw)).bbox for text, hw, input_hw in sizes]
    boxes = np.array([box or (0, 0, 0, 0) for box in found], np.float64)
    for space in ("pixel", "norm1000"):
        written = write_boxes(boxes, space, real.image_hw)
        for seed in range(DRAWS // 2):
            message = problem(replace(real, texts=as_sides(written)).draw(seed), space)
            assert message.startswith("priors.coord_space: boxes as x, y, width, height in ")


def as_sides(boxes: DoubleArray) -> list[str]:
    """Corners as responses with x, y, width, height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return [json.dumps({"bbox": box}) for box in np.concatenate([boxes[:, :2], sides], axis=1).tolist()]


@pytest.mark.skipif(REAL is None, reason="L2L_REAL_DATA is not set")
@pytest.mark.parametrize("part", ["top", "head", "shirt", "left"])
def test_boxes_of_parts_of_real_objects_raise_no_false_alarm(part: str) -> None:
    """Read as x, y, width, height they grow, and fit large objects better."""
    index = refcoco_testa(Path(str(REAL)))
    refs = index.refs.drop_duplicates("ref_id").merge(index.images, on="image_id")
    true, image_hw = np.stack(refs["bbox"].tolist()), refs[["height", "width"]].to_numpy(np.int64)
    rows = np.random.default_rng(0).permutation(len(true))[: DRAWS * SENTENCES].reshape(DRAWS, SENTENCES)
    for seed, (boxes, hw) in enumerate(zip(true[rows], image_hw[rows], strict=True)):
        space: CoordSpace = ("pixel", "norm1000")[seed % 2]
        assert problem(synthetic(space, part_of(boxes, part, seed), boxes, hw), space) == ""


def part_of(boxes: DoubleArray, part: str, seed: int) -> DoubleArray:
    """Boxes of a part of each object: from its top, left or shoulders on 25 to 60 % of it, or a head."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.25, 0.6, len(boxes))
    none, whole = np.zeros_like(share), np.ones_like(share)
    x1, y1, x2, y2 = {
        "top": (none, none, whole, share),
        "left": (none, none, share, whole),
        "shirt": (none, 0.2 * whole, whole, 0.2 + share),
        "head": (0.25 * whole, none, 0.75 * whole, share / 2),
    }[part]
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return np.tile(boxes[:, :2], 2) + sides * np.stack([x1, y1, x2, y2], axis=1)


def shrunk(text: str, factor: float) -> str:
    """Each number of a response times a factor, rounded."""
    return re.sub(r"(?<=[\[ ])\d+(?=[,\]])", lambda number: str(round(float(number[0]) * factor)), text)


# --- synthetic responses ---


def synthetic(space: CoordSpace, boxes: DoubleArray, true_xyxy: DoubleArray, image_hw: NDArray[np.int64]) -> Recorded:
    """Boxes written in a space; the model saw each image at its size for Qwen2.5-VL."""
    input_hw = np.array([qwen_input_hw(*hw) for hw in image_hw.tolist()])
    written = write_boxes(boxes, space, image_hw, input_hw)
    return Recorded([json.dumps({"bbox": box}) for box in written.tolist()], true_xyxy, image_hw, input_hw)


def scenes(seed: int, count: int = SENTENCES) -> tuple[DoubleArray, DoubleArray, NDArray[np.int64]]:
    """Two separate objects in each image: boxes [N, 4], boxes of the others, and image sizes."""
    rng = np.random.default_rng(seed)
    image_hw = np.array([(480, 640), (427, 640), (640, 480), (612, 612), (375, 500)])[rng.integers(5, size=count)]
    sides = rng.uniform(0.15, 0.45, (2, count, 2))
    low = np.stack([rng.uniform(0, 0.5 - sides[0] / 2), rng.uniform(0.5 - sides[1] / 2, 1 - sides[1])])
    first_is_left = rng.random(count) < 0.5
    boxes = np.concatenate([low, low + sides], axis=-1) * image_hw[:, [1, 0, 1, 0]]
    mine, other = np.where(first_is_left[:, None], boxes, boxes[::-1])
    return mine, other, image_hw


def moved(boxes: DoubleArray, spread: float, seed: int) -> DoubleArray:
    """Boxes whose edges move by a normal error, in sides."""
    noise = np.random.default_rng(seed).normal(0, spread, boxes.shape)
    return boxes + noise * np.tile(boxes[:, 2:] - boxes[:, :2], 2)


@pytest.mark.parametrize("space", COORD_SPACES)
def test_every_space_is_recognized(space: CoordSpace) -> None:
    true, _, image_hw = scenes(0)
    recorded = synthetic(space, moved(true, 0.05, 1), true, image_hw)
    assert problem(recorded, space) == ""
    swapped = space.removesuffix("_yx") if space.endswith("_yx") else f"{space}_yx"
    other = "percent" if space.startswith("norm") else "norm1000"
    for configured in (swapped, other):
        named = problem(recorded, configured).split()[1]
        assert named.endswith("_yx") == space.endswith("_yx")
        assert problem(recorded, named) == ""


def test_the_message_states_both_fits_and_the_remedy() -> None:
    true, _, image_hw = scenes(0)
    recorded = synthetic("norm1000", true, true, image_hw)
    fit = float(iou_xyxy(np.clip(true / image_hw[:, [1, 0, 1, 0]] * 1000, 0, image_hw[:, [1, 0, 1, 0]]), true).mean())
    assert problem(recorded, "pixel") == (
        "priors.coord_space: norm1000 fits the responses of m to 20 labeled sentences clearly better than pixel: "
        f"mean IoU 100 against {100 * fit:.0f}; set it, or set priors.check_coords: false"
    )
    assert "set it (in the replay file, for lines that name their own)" in problem(recorded, "pixel", backend="replay")


@pytest.mark.parametrize("form", ["xywh", "cxcywh"])
def test_boxes_that_are_not_corners_are_caught(form: str) -> None:
    true, _, image_hw = scenes(0)
    sides = true[:, 2:] - true[:, :2]
    start = true[:, :2] + (sides / 2 if form == "cxcywh" else 0)
    texts = [json.dumps({"bbox": box}) for box in np.concatenate([start, sides], axis=1).tolist()]
    recorded = Recorded(texts, true, image_hw, image_hw)
    message = problem(recorded, "pixel")
    assert ("width, height in pixel fits" in message, "center" in message) == (True, form == "cxcywh")
    assert message.endswith("; use another prompt (priors.prompt), or set priors.check_coords: false")
    assert "; convert the boxes to corners" in problem(recorded, "pixel", backend="replay")


@pytest.mark.parametrize(("written", "configured"), [("percent", "norm1000"), ("norm1000", "norm1000_yx")])
def test_wrong_coordinates_of_points_are_caught(written: CoordSpace, configured: CoordSpace) -> None:
    true, _, image_hw = scenes(0)
    boxes = write_boxes(true, written, image_hw)
    points = (boxes[:, :2] + boxes[:, 2:]) / 2
    recorded = Recorded([json.dumps({"point": point}) for point in points.tolist()], true, image_hw, image_hw)
    assert problem(recorded, written) == ""
    message = problem(recorded, configured)
    assert message.startswith(f"priors.coord_space: {written} fits")
    assert "share of points on the object 100 against" in message


def llava_like(seed: int, count: int) -> Recorded:
    """Simulated responses with LLaVA-1.5's errors: mean IoU 0.45."""
    index = random_scenes(count, seed)
    refs, sizes = index.refs.iloc[::2], index.images.set_index("image_id")[["height", "width"]]
    image_hw = sizes.loc[refs["image_id"]].to_numpy(np.int64)
    backend = SimulatedBackend("llava-1.5-7b", "unit", seed, make_truth(index.refs, index.objects))
    sentences = zip(refs["sent_id"].tolist(), image_hw.tolist(), strict=True)
    responses = backend.query([Question(sent_id, 0, "", (hw[0], hw[1]), "the cup") for sent_id, hw in sentences])
    true = np.stack(refs["bbox"].tolist()).astype(np.float64)
    return Recorded([response.raw_text for response in responses], true, image_hw, image_hw)


@pytest.mark.parametrize("count", [10, 20, 100])
def test_weak_priors_raise_no_false_alarm(count: int) -> None:
    for seed in range(200 // count):
        assert problem(llava_like(seed, count), "unit") == ""


@pytest.mark.parametrize("count", [10, 20, 100])
@pytest.mark.parametrize("right", [0.0, 0.2])
@pytest.mark.parametrize("space", ["pixel", "norm1000"])
def test_priors_that_are_mostly_wrong_objects_raise_no_false_alarm(space: CoordSpace, right: float, count: int) -> None:
    for seed in range(200 // count):
        mine, other, image_hw = scenes(seed, count)
        is_right = np.random.default_rng(seed).random(count) < right
        boxes = moved(np.where(is_right[:, None], mine, other), 0.1, seed)
        assert problem(synthetic(space, boxes, mine, image_hw), space) == ""


@pytest.mark.parametrize("part", ["top", "head", "shirt", "left"])
def test_boxes_of_parts_of_large_objects_raise_no_false_alarm(part: str) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sides, image_hw = rng.uniform((0.15, 0.5), (0.4, 0.9), (SENTENCES, 2)), np.full((SENTENCES, 2), (480, 640))
        low = rng.uniform(0, 1 - sides)
        true = np.concatenate([low, low + sides], axis=1) * (640, 480, 640, 480)
        for space in ("pixel", "norm1000"):
            assert problem(synthetic(space, part_of(true, part, seed), true, image_hw), space) == ""


def test_points_on_wrong_objects_raise_no_false_alarm() -> None:
    for seed in range(20):
        mine, other, image_hw = scenes(seed)
        points = ((other[:, :2] + other[:, 2:]) / 2 / image_hw[:, ::-1] * 1000).tolist()
        texts = [json.dumps({"point": point}) for point in points]
        assert problem(Recorded(texts, mine, image_hw, image_hw), "norm1000") == ""


def test_few_objects_prove_nothing() -> None:
    """Twenty sentences about five objects are five observations."""
    true, _, image_hw = scenes(0)
    recorded = synthetic("norm1000", true, true, image_hw)
    fits = fit_coords(responses_of(recorded, "pixel"), labels_of(recorded, sentences_per_object=4))
    check_coords(fits)
    assert [fit.describe() for fit in fits] == ["coordinates of m not checked: 5 labeled objects, needs 10"]
    (fit,) = fit_coords(responses_of(recorded, "pixel", model=""), labels_of(recorded, sentences_per_object=4))
    assert fit.describe() == "coordinates not checked: 5 labeled objects, needs 10"


def test_unread_responses_and_further_samples_do_not_count() -> None:
    true, _, image_hw = scenes(0)
    recorded = synthetic("norm1000", true, true, image_hw)
    for changes in ({"failure": "error"}, {"sample_index": 1}):
        assert fit_coords(responses_of(recorded, "pixel", **changes), labels_of(recorded)) == []


@pytest.mark.parametrize("backend", ["detector", "simulated", "none"])
def test_backends_with_known_coordinates_are_not_checked(backend: str) -> None:
    true, _, image_hw = scenes(0)
    recorded = synthetic("norm1000", true, true, image_hw)
    assert fit_coords(responses_of(recorded, "pixel", backend=backend), labels_of(recorded)) == []


def with_masks(recorded: Recorded, masks: list[bytes]) -> pa.Table:
    """Replayed responses with masks beside their texts."""
    table = responses_of(recorded, "norm1000", backend="replay")
    return table.set_column(table.column_names.index("mask"), "mask", pa.array(masks, pa.binary()))


@pytest.mark.parametrize("written", ["percent", "pixel_yx"])
def test_masks_in_another_space_are_caught_by_their_boxes(written: CoordSpace) -> None:
    """Polygons in percent or with swapped axes are drawn at a wrong place; what the text says does not matter."""
    true, _, image_hw = scenes(0)
    drawn = filled(np.clip(write_boxes(true, written, image_hw), 0, np.tile(image_hw[:, ::-1], 2)), image_hw)
    recorded = synthetic("norm1000", true, true, image_hw)
    with pytest.raises(ConfigError) as caught:
        check_coords(fit_coords(with_masks(recorded, drawn), labels_of(recorded)))
    message = str(caught.value)
    assert message.startswith(f"priors.replay_file: {written} fits the masks of m to 20 labeled sentences clearly ")
    assert message.endswith("; write the masks in pixels of the stored images, or set priors.check_coords: false")


def test_right_and_weak_masks_pass() -> None:
    """Also beside a text in a wrong space, since nothing reads its box."""
    for seed in range(5):
        true, other, image_hw = scenes(seed)
        recorded = synthetic("percent", true, true, image_hw)
        labels = labels_of(recorded)
        for boxes in (true, other, part_of(true, "top", seed), part_of(true, "head", seed)):
            table = with_masks(recorded, filled(boxes, image_hw))
            (fit,) = fit_coords(table, labels)
            assert (fit.remedy, fit.sentences) == ("", SENTENCES)
            assert fit.describe().startswith("masks: pixel fits with mean IoU ")
            assert scores_by_space([fit]) == []


def test_scores_of_every_space_are_those_of_its_boxes() -> None:
    """In norm1000 half of the boxes are exact and half mark another object; hand-converted, pixel reads thousandths."""
    true, other, image_hw = scenes(0)
    boxes = np.where((np.arange(SENTENCES) % 2 == 0)[:, None], true, other)
    recorded = synthetic("norm1000", boxes, true, image_hw)
    (row,) = scores_by_space(fit_coords(responses_of(recorded, "norm1000"), labels_of(recorded)))
    assert (row["model"], row["coord_space"], row["sentences"]) == ("m", "norm1000", 20)
    assert list(row["box_miou"]) == list(row["box_acc50"]) == list(COORD_SPACES)
    assert (row["box_miou"]["norm1000"], row["box_acc50"]["norm1000"]) == (50.0, 50.0)
    size = np.tile(image_hw[:, ::-1], 2)
    misread = iou_xyxy(np.clip(boxes / size * 1000, 0, size), true)
    assert row["box_miou"]["pixel"] == round(100 * misread.mean(), 2)
    assert row["box_acc50"]["pixel"] == 100 * (misread >= 0.5).mean()


def test_scores_of_points_are_their_hits() -> None:
    true, _, image_hw = scenes(0)
    centers = (true[:, :2] + true[:, 2:]) / 2
    recorded = Recorded([json.dumps({"point": point}) for point in centers.tolist()], true, image_hw, image_hw)
    (row,) = scores_by_space(fit_coords(responses_of(recorded, "pixel"), labels_of(recorded)))
    assert set(row) == {"model", "coord_space", "sentences", "pointing_acc"}
    assert row["pointing_acc"]["pixel"] == 100.0 > row["pointing_acc"]["percent"]


def test_each_model_is_checked_on_its_own() -> None:
    true, _, image_hw = scenes(0, 40)
    right, wrong = (responses_of(synthetic("norm1000", true, true, image_hw), "norm1000", model=name) for name in "ab")
    wrong = wrong.set_column(wrong.column_names.index("coord_space"), "coord_space", pa.array(["pixel"] * 40))
    labels = labels_of(synthetic("norm1000", true, true, image_hw))
    mixed = pa.concat_tables([right.slice(0, 20), wrong.slice(20)])
    with pytest.raises(ConfigError, match="norm1000 fits the responses of b to 20 labeled sentences"):
        check_coords(fit_coords(mixed, labels))
