"""The recipes of docs/masks.md, run as they stand on stand-ins for the outputs of the systems that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle
from l2l_core.datasets.read import load_dataset
from l2l_core.mllm.query import make_questions, query_table
from l2l_core.mllm.replay import ReplayBackend, load_recorded
from l2l_core.priors.table import interpret

PAGE = (Path(__file__).parents[1] / "docs" / "masks.md").read_text(encoding="utf-8")
SIZES = {"a.png": (20, 30), "b.png": (40, 25)}  # height, width
PAIRS = [("a.png", "The red cup"), ("a.png", "the dog, left"), ("b.png", "nothing there"), ("b.png", "the door")]
"""Image and sentence; sent_id is the place in the list. The systems find nothing for the third one."""


def recipe(heading: str) -> list[str]:
    """The code of a section of the page, block by block."""
    (section,) = re.findall(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


def run(code: str, **names: Any) -> None:
    exec(compile(code, "docs/masks.md", "exec"), {"__name__": "recipe"} | names)


def found(sent_id: int) -> np.ndarray:
    """The mask that a system finds for a sentence; each is another one."""
    mask = np.zeros(SIZES[PAIRS[sent_id][0]], dtype=bool)
    if sent_id != 2:
        mask[sent_id + 1 : sent_id + 9, 4 : 12 + sent_id] = True
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def halves(mask: np.ndarray) -> list[np.ndarray]:
    """The mask in two overlapping parts."""
    columns = np.arange(mask.shape[1])
    return [mask & (columns < 9), mask & (columns > 6)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in data/mine, and its sentences as the first recipe writes them."""
    (tmp_path / "data/mine").mkdir(parents=True)
    for name, size in SIZES.items():
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "data/mine" / name)
    lines = [json.dumps({"image": image, "sentence": sentence}) + "\n" for image, sentence in PAIRS]
    (tmp_path / "data/mine/pairs.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    run(*recipe("The sentences"))
    return tmp_path


def check(scores: list[float | None]) -> None:
    """The priors of responses.jsonl are the masks that the system found, with these scores."""
    index = load_dataset("data/mine")
    refs, images = (records.to_frame(table) for table in (index.refs, index.images))
    responses = load_recorded("responses.jsonl", refs, images, "auto")
    assert sorted(responses) == [(sent_id, 0) for sent_id in range(len(PAIRS))]
    paths = records.IndexPaths(*(Path(f"{name}.parquet") for name in ("images", "refs", "objects", "masks")))
    records.write_table(index.images, paths.images, records.IMAGES)
    records.write_table(index.refs, paths.refs, records.REFS)
    priors = interpret(query_table(ReplayBackend(responses), make_questions(paths, 1))).to_pylist()
    assert [prior["status"] for prior in priors] == ["ok", "ok", "empty", "ok"]
    assert [prior["score"] for prior in priors] == [
        score if score is None else pytest.approx(score) for score in scores
    ]
    for prior in priors:
        mask = found(prior["sent_id"])
        if mask.any():
            np.testing.assert_array_equal(decode_rle(prior["mask"], *mask.shape), mask)
        else:
            assert prior["mask"] is None


def test_first_recipe_writes_the_sentences(project: Path) -> None:
    rows = [json.loads(line) for line in Path("sentences.jsonl").read_text().splitlines()]
    assert rows == [
        {"sent_id": sent_id, "file_name": f"data/mine/{image}", "sentence": sentence}
        for sent_id, (image, sentence) in enumerate(PAIRS)
    ]


def test_sam_3_agent(project: Path) -> None:
    Path("agent_output").mkdir()
    for sent_id, (image, sentence) in enumerate(PAIRS):
        parts = halves(found(sent_id)) if sent_id != 2 else []
        height, width = SIZES[image]
        output = {
            "original_image_path": f"data/mine/{image}",
            "orig_img_h": height,
            "orig_img_w": width,
            "pred_boxes": [[0.1, 0.2, 0.3, 0.4] for _ in parts],
            "pred_scores": [0.9, 0.75][: len(parts)],
            "pred_masks": [rle(part)["counts"] for part in parts],
            "text_prompt": sentence,
            "image_path": f"data/mine/{image}",
        }
        Path(f"agent_output/{sent_id}_agent_qwen_pred.json").write_text(json.dumps(output))
        Path(f"agent_output/{sent_id}_agent_qwen_history.json").write_text("[]")
    run(*recipe("SAM 3 agent"))
    check([0.75, 0.75, None, 0.75])


def test_grounded_sam_2(project: Path) -> None:
    """Two boxes give scores in lists, one box a number; SAM 2's estimate may exceed 1."""
    Path("grounded_sam2").mkdir()
    for sent_id, scores in enumerate([[[0.5], [0.75]], [[0.5], [1.01]], [], [0.25]]):
        masks = [~found(sent_id), found(sent_id)][-len(scores) :] if scores else []
        annotations = [
            {"class_name": "it", "bbox": [1, 2, 3, 4], "segmentation": rle(mask), "score": score}
            for mask, score in zip(masks, scores, strict=True)
        ]
        height, width = SIZES[PAIRS[sent_id][0]]
        output = {"image_path": "x.jpg", "annotations": annotations, "box_format": "xyxy"}
        output |= {"img_width": width, "img_height": height}
        Path(f"grounded_sam2/{sent_id}.json").write_text(json.dumps(output))
    run(*recipe("Grounded-SAM 2"))
    check([0.75, 1, None, 0.25])


def test_sa2va(project: Path) -> None:
    asked: list[str] = []

    def predict_forward(image: Image.Image, text: str, tokenizer: object) -> dict[str, Any]:
        sent_id = len(asked)
        asked.append(text)
        assert (image.height, image.width) == SIZES[PAIRS[sent_id][0]]
        masks = [part[None] for part in halves(found(sent_id))] if sent_id != 2 else []
        return {"prediction": "Sure, [SEG]." if masks else "No.", "prediction_masks": masks}

    run(*recipe("Sa2VA"), model=SimpleNamespace(predict_forward=predict_forward), tokenizer=None)
    assert all(sentence in text for text, (_, sentence) in zip(asked, PAIRS, strict=True))
    check([None] * 4)


def test_x_sam(project: Path) -> None:
    """Its sample_id counts the sentences of an image; a mask without a pixel means that nothing was found."""
    told, predicted = [], []
    for sent_id, (image, sentence) in enumerate(PAIRS):
        image_id, sample_id = 100 + list(SIZES).index(image), sent_id % 2
        told.append(
            {
                "image_id": image_id,
                "image_file": image,
                "image_size": SIZES[image],
                "sampled_sents": [sentence.lower()],
                "annotations": [],
                "image_info": {"image_id": image_id, "sample_id": sample_id, "phrases": [sentence.lower()]},
            }
        )
        row = {"image_id": image_id, "sample_id": sample_id, "file_name": image, "segments_info": []}
        predicted.append(row | {"pred_mask": rle(found(sent_id))})
    Path("gt.json").write_text(json.dumps(told[::-1]))
    Path("predictions.json").write_text(json.dumps(predicted))
    run(*recipe("X-SAM"))
    check([None] * 4)


def test_evf_sam(project: Path) -> None:
    Path("evf_sam").mkdir()
    save, name = recipe("EVF-SAM, or any array per sentence")
    for sent_id in range(len(PAIRS)):
        run(save, sent_id=sent_id, pred_mask=found(sent_id))
    run(name)
    check([None] * 4)
