"""The picture of README.md: what becomes of a few sentences of the default run, step by step.

    python -m bench.picture     (after bench.default_run, whose run it shows)

Sentences are not hand-picked: of the last round's accepted and rejected pseudo-labels, and of the test sentences that
the final model finds and misses (IoU of 0.5), the ones in the middle by accept_prob and by IoU. Writes
docs/images/example.png.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from bench.default_run import CLONE, ROOT
from l2l_core.artifacts import records
from l2l_core.core.images import read_image
from l2l_core.core.masks import decode_rle
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.evaluation.history import read_history
from l2l_core.viz import overlays

PICTURE = ROOT / "docs" / "images" / "example.png"
SIDE_PX = 224

Panels = list[tuple[str, overlays.Picture]]


def middle(rows: pd.DataFrame, by: str) -> pd.Series:
    """The row in the middle of the order by a column."""
    return rows.sort_values([by, "sent_id"]).iloc[len(rows) // 2]


def chosen() -> Iterator[tuple[str, Panels]]:
    """A title and five panels for each of four sentences, in a project's folder with a finished run."""
    number = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["round"]
    frame, read = records.to_frame, records.read_table
    history = read_history(records.round_folder(number) / "history")
    sentences = frame(read(records.INDEX.refs, records.REFS)).merge(
        frame(read(records.INDEX.images, records.IMAGES)), on="image_id"
    )
    sentences = sentences.set_index("sent_id")
    truth = frame(read(records.INDEX.masks, records.MASKS)).set_index("ann_id")["rle_counts"]
    priors = frame(read(records.PRIORS_PATH, records.PRIORS)).query("sample_index == 0").set_index("sent_id")
    proposals = frame(read(records.PROPOSALS_PATH, records.PROPOSALS)).set_index("sent_id")

    def common(sent_id: int) -> tuple[overlays.Picture, Panels, np.ndarray]:
        sentence, prior, proposal = sentences.loc[sent_id], priors.loc[sent_id], proposals.loc[sent_id]
        image = overlays.fit(read_image(sentence["file_name"]), SIDE_PX)
        size = np.array([sentence["width"], sentence["height"]] * 2, np.float64)
        boxes = [] if prior["bbox"] is None else [np.asarray(prior["bbox"], np.float64) / size]
        soft = np.frombuffer(proposal["soft"], np.uint8).reshape(proposal["height"], proposal["width"])
        panels = [
            ("image", image),
            ("prior", overlays.with_boxes(image, boxes, [])),
            ("proposal", overlays.with_soft_map(image, soft)),
        ]
        return image, panels, decode_rle(truth[sentence["ann_id"]], sentence["height"], sentence["width"])

    labels = frame(history.pseudo_labels).query("round == @number")
    for accepted, verdict in ((True, "accepted"), (False, "rejected")):
        row = middle(labels[labels["accepted"] == accepted], "accept_prob")
        image, panels, true = common(row["sent_id"])
        mask, keep = (decode_rle(row[name], row["height"], row["width"]) for name in ("rle_counts", "keep_rle"))
        shown = overlays.with_kept(image, mask, keep) if accepted else overlays.with_mask(image, mask)
        panels += [("label, kept pixels" if accepted else "label", shown)]
        panels += [("label against truth", overlays.with_errors(image, mask, true))]
        title = f"unlabeled: “{sentences.at[row['sent_id'], 'sentence']}”, {verdict} ({row['accept_prob']:.2f})"
        yield title, panels
    scored = frame(read(records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    scored = scored[(scored["method"] == f"round_{number}") & (scored["split"] == "test")]
    predictions = frame(history.predictions)
    predictions = predictions[(predictions["model"] == f"round_{number}") & predictions["with_prior"]]
    for found in (True, False):
        row = middle(scored[(scored["iou"] >= POSITIVE_IOU) == found], "iou")
        image, panels, true = common(row["sent_id"])
        mask = decode_rle(predictions.set_index("sent_id").at[row["sent_id"], "rle_counts"], *true.shape)
        panels += [("prediction", overlays.with_mask(image, mask))]
        panels += [("prediction against truth", overlays.with_errors(image, mask, true))]
        yield f"test: “{sentences.at[row['sent_id'], 'sentence']}”, IoU {row['iou']:.2f}", panels


def main() -> None:
    with contextlib.chdir(CLONE):
        rows = list(chosen())
    figure = Figure(figsize=(10, 2.35 * len(rows)), layout="constrained")
    parts: Any = figure.subfigures(len(rows), 1)
    for row, (part, (title, panels)) in enumerate(zip(parts, rows, strict=True)):
        part.suptitle(title, fontsize=10, x=0.01, ha="left")
        for axes, (name, picture) in zip(part.subplots(1, len(panels)), panels, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(name if row in (0, 2) else "", fontsize=9)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=80, metadata={"Software": None})
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
