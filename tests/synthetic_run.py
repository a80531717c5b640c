"""A small synthetic run on disk: everything that evaluation and the report read, without any training."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from l2l_core.artifacts import records
from l2l_core.core.files import file_sha256
from l2l_core.core.masks import encode_rle
from stages import evaluate

WORDS = ("left", "right", "dark", "bright", "big", "small", "upper", "lower")
TRAP = '<script>alert("pwned")</script> & the "dot"'
"""A sentence that a report must show but not execute."""

PRIOR_SCORE_NAMES = ("box_acc50", "box_miou", "mask_miou", "pointing_acc", "score_auroc")
PRIOR_SCORES = {
    "labeled": 20,
    "labeled_without_prior": 3,
    **dict(zip(PRIOR_SCORE_NAMES, (85.0, 70.5, 64.0, 90.0, None), strict=True)),
    "by_source": {
        "replay org/<b>": dict(zip(PRIOR_SCORE_NAMES, (100.0, 81.0, 72.5, 95.0, 66.5), strict=True)),
        "replay org/c": dict(zip(PRIOR_SCORE_NAMES, (None, None, None, 80.0, None), strict=True)),
    },
}
"""Scores as the stage `priors` writes them, for recorded responses of two models."""


def write_run(root: Path, rounds: int = 2, images_per_split: int = 8, height: int = 48, width: int = 64) -> None:
    """Write index, split, priors, proposals and the histories of round `rounds` and the distilled model below `root`.

    Splits train (labeled and unlabeled), val and test; each image holds an ellipse and two sentences about it. Models
    predict the true mask moved by a few pixels, less with each round; every fifth prior response is missing.
    """
    generator = np.random.default_rng(5)
    images, refs, masks, split, priors, proposals, true = [], [], [], [], [], [], {}
    for number, part in enumerate(np.repeat(["train", "val", "test"], images_per_split)):
        image, mask = _scene(generator, height, width)
        name = f"images/{number:03d}.png"
        (root / "images").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), image)
        digest = file_sha256(root / name)
        images.append({"image_id": number, "file_name": name, "height": height, "width": width, "sha256": digest})
        masks.append(
            {"ann_id": number, "height": height, "width": width, "rle_counts": encode_rle(mask), "area_px": mask.sum()}
        )
        ys, xs = np.nonzero(mask)
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=np.float32)
        for which in range(2):
            sent_id = 2 * number + which
            true[sent_id] = mask
            sentence = TRAP if sent_id % 4 == 1 else f"the {' '.join(generator.choice(WORDS, 2))} dot"
            refs.append(
                {"sent_id": sent_id, "ref_id": number, "ann_id": number, "image_id": number, "category": "dot"}
                | {"sentence": sentence, "style": ("short", "long")[which], "split": str(part), "bbox": box.tolist()}
            )
            role = "eval" if part != "train" else "labeled" if number == 0 else "unlabeled"
            split.append({"sent_id": sent_id, "role": role})
            has_box = sent_id % 5 != 4
            guess = np.clip(box + generator.integers(-6, 7, 4), 0, [width, height, width, height])
            priors.append(_prior(sent_id, guess.tolist() if has_box else None))
            soft = np.full((24, 24), 25, np.uint8)
            if has_box:
                x1, y1, x2, y2 = (guess * 24 / [width, height, width, height]).astype(int)
                soft[y1 : y2 + 1, x1 : x2 + 1] = 230
                soft = cv2.GaussianBlur(soft, (5, 5), 0)
            proposals.append(
                {"sent_id": sent_id, "height": 24, "width": 24, "soft": soft.tobytes(), "score": float(has_box)}
            )
    records.write_table(records.make_table(images, records.IMAGES), root / records.INDEX.images, records.IMAGES)
    records.write_table(records.make_table(refs, records.REFS), root / records.INDEX.refs, records.REFS)
    records.write_table(records.make_table(masks, records.MASKS), root / records.INDEX.masks, records.MASKS)
    records.write_table(records.make_table(split, records.SPLIT), root / records.SPLIT_PATH, records.SPLIT)
    records.write_table(records.make_table(priors, records.PRIORS), root / records.PRIORS_PATH, records.PRIORS)
    records.write_table(
        records.make_table(proposals, records.PROPOSALS), root / records.PROPOSALS_PATH, records.PROPOSALS
    )
    rendered = {
        "renderer": "box",
        "ring": 0.1,
        "core": 0.0,
        "size_px": 24,
        "falloff": 0.15,
        "inside_prob": 0.9,
        "flat_prob": 0.1,
    }
    (root / records.RENDERING_PATH).write_text(json.dumps({"proposals": rendered}))
    records.write_metrics(PRIOR_SCORES, root / records.PRIORS_METRICS_PATH)
    records.write_metrics({"miou": 61.25, "score_auroc": None}, root / records.PROPOSALS_METRICS_PATH)
    roles = {row["sent_id"]: row["role"] for row in split}
    folder = root / records.round_folder(rounds) / "history"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [sent_id for sent_id, role in roles.items() if role == "eval"]
    predictions = _predictions(generator, true, wanted, rounds)
    records.write_table(predictions, folder / "predictions.parquet", records.PREDICTIONS)
    unlabeled = [sent_id for sent_id, role in roles.items() if role == "unlabeled"]
    labels = [_label(generator, number, i, true[i]) for number in range(1, rounds + 1) for i in unlabeled]
    table = records.make_table(labels, records.PSEUDO_LABELS)
    records.write_table(table, folder / "pseudo_labels.parquet", records.PSEUDO_LABELS)
    _write_curves(folder, rounds)
    shutil.copytree(folder, root / records.DISTILLED_FOLDER / "history", dirs_exist_ok=True)
    distilled = pa.concat_tables([predictions, _predictions_of(generator, true, wanted, [("distilled", False, 5)])])
    path = root / records.DISTILLED_FOLDER / "history" / "predictions.parquet"
    records.write_table(distilled, path, records.PREDICTIONS)
    with (path.parent / "training.csv").open("a") as file:
        file.write("distilled,0,1.5,0.6,0.9,0.001\n")


def write_evaluated_run(root: Path) -> None:
    """A run of two rounds below `root`, with the project's parameters, scored by the stage `evaluate`."""
    write_run(root, rounds=2)
    shutil.copy("params.yaml", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("sys.argv", ["evaluate", "--round", "2"])
        evaluate.main()


def shifted(mask: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The mask moved by dx, dy pixels; pixels that leave the image are dropped."""
    moved = np.zeros_like(mask)
    height, width = mask.shape
    moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return moved


def _scene(generator: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    centre = (
        int(generator.integers(width // 4, 3 * width // 4)),
        int(generator.integers(height // 4, 3 * height // 4)),
    )
    axes = tuple(generator.integers(min(height, width) // 8, min(height, width) // 4, 2).tolist())
    canvas = np.zeros((height, width), np.uint8)
    cv2.ellipse(canvas, centre, axes, 0, 0, 360, 1, -1)
    mask = canvas.astype(bool)
    image = generator.integers(60, 100, (height, width, 3)).astype(np.uint8)
    image[mask] = generator.integers(120, 255, 3)
    return image, mask


def _prior(sent_id: int, box: list[float] | None) -> dict[str, object]:
    status, score, raw = ("ok", 0.8, f'{{"box": {box}}}') if box else ("empty", None, "I cannot see it")
    response = {"status": status, "bbox": box, "score": score, "raw_text": raw, "target": "dot" if box else None}
    return {
        "sent_id": sent_id,
        "sample_index": 0,
        "backend": "simulated",
        "model": "llava",
        "prompt_sha256": "",
    } | response


def _predictions(
    generator: np.random.Generator, true: dict[int, np.ndarray], wanted: list[int], rounds: int
) -> pa.Table:
    ways = [("supervised", False, 12)]
    for number in range(rounds + 1):
        ways += [(f"round_{number}", True, 8 - 2 * number), (f"round_{number}", False, 10 - 2 * number)]
    return _predictions_of(generator, true, wanted, ways)


def _predictions_of(
    generator: np.random.Generator, true: dict[int, np.ndarray], wanted: list[int], ways: list[tuple[str, bool, int]]
) -> pa.Table:
    """ways: model, with_prior, and how many pixels its masks are off at most."""
    rows = []
    for model, with_prior, reach in ways:
        for sent_id in wanted:
            mask = shifted(true[sent_id], *generator.integers(-reach, reach + 1, 2))
            size = {"height": mask.shape[0], "width": mask.shape[1]}
            key = {"model": model, "with_prior": with_prior, "sent_id": sent_id}
            rows.append(key | size | {"rle_counts": encode_rle(mask)})
    return records.make_table(rows, records.PREDICTIONS)


def _label(generator: np.random.Generator, number: int, sent_id: int, true: np.ndarray) -> dict[str, object]:
    moved = generator.integers(-10 + number, 11 - number, 2)
    label, keep = shifted(true, *moved), np.ones_like(true)
    keep[:: 6 - number] = False
    accept_prob = float(np.clip(1 - np.abs(moved).sum() / 16 + generator.normal(0, 0.1), 0, 1))
    return {
        "round": number,
        "sent_id": sent_id,
        "height": true.shape[0],
        "width": true.shape[1],
        "rle_counts": encode_rle(label),
        "keep_rle": encode_rle(keep & (accept_prob > 0.5)),
        "accept_prob": accept_prob,
        "reward": accept_prob - 0.5,
        "prior_iou": 0.5,
        "confidence": 0.9,
        "accepted": accept_prob > 0.5,
        "method": "reinforce",
    }


def _write_curves(folder: Path, rounds: int) -> None:
    lines = ["model,step,loss,bce,dice,lr"]
    for index, model in enumerate(["supervised", *(f"round_{number}" for number in range(rounds + 1))]):
        for step in range(0, 200, 20):
            bce, dice = 0.6 / (1 + step / 50 + index), 0.9 / (1 + step / 80 + index)
            lines.append(f"{model},{step},{bce + dice:.5f},{bce:.5f},{dice:.5f},{0.001 * (1 - step / 200):.6f}")
    (folder / "training.csv").write_text("\n".join(lines) + "\n")
    lines = ["round,step,reward,keep_rate,accept_rate,entropy,advantage_std"]
    for number in range(1, rounds + 1):
        for step in range(0, 100, 10):
            rise = step / 100 / number
            lines.append(f"{number},{step},{0.1 + 0.3 * rise:.4f},{1 - 0.3 * rise:.4f},{0.9 - 0.4 * rise:.4f},0.6,0.2")
    (folder / "policy.csv").write_text("\n".join(lines) + "\n")
