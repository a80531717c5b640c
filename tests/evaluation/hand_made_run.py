"""Masks drawn by hand on images of 4 x 10 pixels: truth, predictions, pseudo-labels and proposals of a run."""

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.evaluation.history import History

HEIGHT, WIDTH = 4, 10
NO_LABELS = records.PSEUDO_LABELS.empty_table()


def columns(first: int, last: int) -> bytes:
    """Return a mask of the columns first..last-1 of a 4 x 10 image, with 4 pixels per column."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, first:last] = True
    return encode_rle(mask)


def ref(sent_id: int, ann_id: int, split: str, role: str) -> dict[str, object]:
    row = {"sent_id": sent_id, "ref_id": ann_id, "ann_id": ann_id, "image_id": ann_id, "style": "", "split": split}
    return row | {"role": role, "sentence": "it", "category": "thing"}


def index(rows: list[dict[str, object]], truth: dict[int, bytes]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return refs, masks, and split from rows of `ref` and masks by ann_id."""
    size = {"height": HEIGHT, "width": WIDTH}
    masks = [
        {"ann_id": ann_id, "rle_counts": rle, "area_px": int(decode_rle(rle, HEIGHT, WIDTH).sum())} | size
        for ann_id, rle in truth.items()
    ]
    refs = [{name: value for name, value in row.items() if name != "role"} for row in rows]
    split = [{"sent_id": row["sent_id"], "role": row["role"]} for row in rows]
    return (
        records.make_table(refs, records.REFS),
        records.make_table(masks, records.MASKS),
        records.make_table(split, records.SPLIT),
    )


def prediction(model: str, with_prior: bool, sent_id: int, rle: bytes, width: int = WIDTH) -> dict[str, object]:
    key = {"model": model, "with_prior": with_prior, "sent_id": sent_id}
    return key | {"height": HEIGHT, "width": width, "rle_counts": rle}


def label(sent_id: int, rle: bytes, keep: bytes, accept_prob: float, number: int = 1) -> dict[str, object]:
    row = {"round": number, "sent_id": sent_id, "height": HEIGHT, "width": WIDTH, "rle_counts": rle, "keep_rle": keep}
    return row | {"accept_prob": accept_prob, "accepted": accept_prob > 0.5, "method": "threshold"}


def proposal(sent_id: int, first: int, last: int) -> dict[str, object]:
    soft = np.zeros((HEIGHT, WIDTH), np.uint8)
    soft[:, first:last] = 255
    return {"sent_id": sent_id, "height": HEIGHT, "width": WIDTH, "soft": soft.tobytes(), "score": 1.0}


def history(predictions: list[dict[str, object]], labels: list[dict[str, object]] | None = None) -> History:
    return History(
        records.make_table(predictions, records.PREDICTIONS),
        records.make_table(labels, records.PSEUDO_LABELS) if labels else NO_LABELS,
        pd.DataFrame({"model": ["supervised", "round_0"], "step": [0, 0], "loss": [1.0, 0.5]}),
        pd.DataFrame({"round": [], "step": [], "reward": []}),
    )


# Sentence 1 (val): truth is columns 0-3 (16 px). Sentence 2 (val): columns 0-9 (40 px). Sentence 3 (test): columns 5-9.
ROWS = [ref(1, 11, "val", "eval"), ref(2, 12, "val", "eval"), ref(3, 13, "test", "eval")]
TRUTH = {11: columns(0, 4), 12: columns(0, 10), 13: columns(5, 10)}
GUESSES = {
    ("supervised", False): {1: columns(6, 8), 2: columns(0, 5), 3: columns(0, 0)},  # IoU 0, 1/2, 0 (nothing predicted)
    ("round_0", True): {1: columns(1, 5), 2: columns(0, 9), 3: columns(5, 10)},  # IoU 3/5, 9/10, 1
    ("round_0", False): {1: columns(2, 6), 2: columns(0, 5), 3: columns(4, 10)},  # IoU 2/6, 1/2, 5/6
    ("distilled", False): {1: columns(0, 5), 2: columns(0, 8), 3: columns(5, 10)},  # IoU 4/5, 8/10, 1
}
PREDICTIONS = [prediction(*key, sent_id, rle) for key, rows in GUESSES.items() for sent_id, rle in rows.items()]
ROUND_1 = [prediction("round_1", *key[1:], i, rle) for key, rows in GUESSES.items() for i, rle in rows.items()][3:9]
PROPOSALS = records.make_table([proposal(1, 0, 2), proposal(2, 0, 10), proposal(3, 0, 5)], records.PROPOSALS)
