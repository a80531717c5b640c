"""Rank pseudo-labels for human review, as tasks for Label Studio."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l2l_core.core.masks import BoolMask, decode_rle
from l2l_core.export.outlines import mask_to_polygons

LABEL = "object"
FROM_NAME, TO_NAME = "mask", "image"  # names of the labeling interface's tags, referenced by the predictions

BRUSH_RUN_BITS = (3, 4, 8, 16)  # the widths of Label Studio's own encoder
MAX_BRUSH_RUN = 1 << BRUSH_RUN_BITS[-1]
CHANNELS = 4  # a brush mask is an RGBA image


def review_scores(labels: pd.DataFrame) -> NDArray[np.float64]:
    """[N] in [0, 1]: value of reviewing each label (columns accept_prob, prior_iou, sentence, image_id).

    Informative times representative, as in information density (Settles & Craven 2008). Informative is the mean of
    1 - |2 accept_prob - 1| (undecided: 1) and 1 - prior_iou (label and prior do not overlap, or no prior: 1).
    Representative is the mean of how frequent the sentence's words and the image's sentences are among all labels:
    log(1 + count) / log(1 + the largest count), for words the mean over the distinct words of the sentence.
    """
    undecided = 1 - np.abs(2 * labels["accept_prob"].to_numpy(np.float64) - 1)
    differing = 1 - labels["prior_iou"].to_numpy(np.float64)
    words = [sorted(set(re.findall(r"\w+", text.casefold()))) for text in labels["sentence"]]
    word_share = _frequency(word for some in words for word in some)
    image_share = _frequency(labels["image_id"])
    by_word = np.array([np.mean([word_share[word] for word in some]) for some in words])
    by_image = labels["image_id"].map(image_share).to_numpy(np.float64)
    return np.asarray((undecided + differing) / 2 * (by_word + by_image) / 2)


def label_studio_tasks(labels: pd.DataFrame, limit: int, image_prefix: str, *, polygons: bool) -> list[dict[str, Any]]:
    """The `limit` labels of highest score, best first, in Label Studio's basic JSON format, as predictions.

    labels: from `labels.read_labels`. image_prefix is put before the image's quoted path from the project's root.
    The prediction's score is accept_prob; `data` holds the sentence and the reasons for the review.
    """
    scored = labels.assign(review_score=review_scores(labels))
    best = scored.sort_values(["review_score", "sent_id"], ascending=[False, True]).head(limit)
    return [_task(row, image_prefix, polygons) for row in best.astype(object).itertuples(index=False)]


def labeling_interface(*, polygons: bool) -> str:
    """The labeling interface (XML) for the tasks."""
    tag = "PolygonLabels" if polygons else "BrushLabels"
    return f"""<View>
  <Header value="$sentence"/>
  <Image name="{TO_NAME}" value="$image" zoom="true"/>
  <{tag} name="{FROM_NAME}" toName="{TO_NAME}">
    <Label value="{LABEL}"/>
  </{tag}>
</View>
"""


def brush_rle(mask: BoolMask) -> list[int]:
    """[H, W] mask -> the bytes of Label Studio's brush: the RGBA pixels, 255 for foreground, as packed runs.

    Head: number of values (32 bits), bits of a value - 1 (5), bits of the four kinds of run length - 1 (4 each). Then
    each run: a set bit (a repeated value), the kind (2 bits), length - 1, value. Bits are in order from the highest on,
    padded to whole bytes. The format is that of @thi.ng/rle-pack.
    """
    pixels = mask.ravel()
    first = np.flatnonzero(np.diff(pixels, prepend=not pixels[0]))
    lengths = np.diff(first, append=pixels.size) * CHANNELS
    bits = [f"{pixels.size * CHANNELS:032b}", f"{8 - 1:05b}", *(f"{width - 1:04b}" for width in BRUSH_RUN_BITS)]
    for length, is_set in zip(lengths.tolist(), pixels[first].tolist(), strict=True):
        for done in range(0, length, MAX_BRUSH_RUN):
            run = min(length - done, MAX_BRUSH_RUN)
            kind, width = next((k, width) for k, width in enumerate(BRUSH_RUN_BITS) if run <= 1 << width)
            bits.append(f"1{kind:02b}{run - 1:0{width}b}{255 * is_set:08b}")
    text = "".join(bits)
    return list(int(text.ljust(-len(text) // 8 * -8, "0"), 2).to_bytes(-(-len(text) // 8), "big"))


def _frequency(items: Iterable[Any]) -> dict[Any, float]:
    """Each item's log(1 + count), relative to the most frequent item's."""
    counts = Counter(items)
    largest = max(counts.values())
    return {item: float(np.log1p(count) / np.log1p(largest)) for item, count in counts.items()}


def _task(row: Any, image_prefix: str, polygons: bool) -> dict[str, Any]:
    mask = decode_rle(row.rle_counts, row.height, row.width)
    kind = "polygonlabels" if polygons else "brushlabels"
    shapes = _polygon_values(mask) if polygons else _brush_values(mask)
    frame = {
        "from_name": FROM_NAME,
        "to_name": TO_NAME,
        "type": kind,
        "original_width": row.width,
        "original_height": row.height,
        "image_rotation": 0,
    }
    regions = [
        {"id": f"{row.sent_id}-{index}", **frame, "value": {**value, kind: [LABEL]}}
        for index, value in enumerate(shapes)
    ]
    return {
        "data": {
            "image": image_prefix + quote(row.file_name),
            "sentence": row.sentence,
            "sent_id": row.sent_id,
            "review_score": round(row.review_score, 4),
            "accept_prob": round(row.accept_prob, 4),
            "prior_iou": round(row.prior_iou, 4),
            "accepted": row.accepted,
        },
        "predictions": [
            {"model_version": f"round_{row.round} {row.method}", "score": round(row.accept_prob, 4), "result": regions}
        ],
    }


def _brush_values(mask: BoolMask) -> list[dict[str, object]]:
    return [{"format": "rle", "rle": brush_rle(mask)}] if mask.any() else []


def _polygon_values(mask: BoolMask) -> list[dict[str, object]]:
    """Corners in percent of the image's width and height."""
    percent = 100 / np.array(mask.shape[::-1], dtype=np.float64)
    found = [np.reshape(polygon, (-1, 2)) * percent for polygon in mask_to_polygons(mask)]
    return [{"points": np.round(points, 4).tolist(), "closed": True} for points in found]
