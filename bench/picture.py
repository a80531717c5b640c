"""Pictures of the docs: what becomes of a few sentences of a run, step by step.

    python -m bench.picture              (after bench.default_run, whose run it shows: docs/images/example.png)
    python -m bench.picture --photos     (after bench.photos, whose last run it shows: docs/images/photos.png)

Sentences are not hand-picked: of the last round's accepted and rejected pseudo-labels, and of the test sentences that
the final model finds and misses (IoU of 0.5), the ones in the middle by accept_prob and by IoU. --photos shows only
photos whose license allows changed copies (LICENSES), and writes their sources and licenses beside the picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from bench import docs, photos
from bench.default_run import CLONE, ROOT
from l2l_core.artifacts import records
from l2l_core.core.images import read_image
from l2l_core.core.masks import decode_rle
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.evaluation.history import read_history
from l2l_core.viz import overlays

IMAGES = ROOT / "docs" / "images"
SIDE_PX = 224

LICENSES = {4: "CC BY 2.0", 7: "no known copyright restrictions", 8: "United States government work"}
"""Ids of COCO's licenses that allow showing a changed copy with its source beside it."""
CREDITS = "photo_credits"

Panels = list[tuple[str, overlays.Picture]]


def middle(rows: pd.DataFrame, by: str) -> pd.Series:
    """The row in the middle of the order by a column. Raises SystemExit if there is none."""
    if rows.empty:
        raise SystemExit(f"no picture: no sentence to show by its {by}; run the bench again with more sentences")
    return rows.sort_values([by, "sent_id"]).iloc[len(rows) // 2]


def chosen(images: set[int] | None = None) -> Iterator[tuple[int, str, Panels]]:
    """The image_id, a title and five panels of each of four sentences, in a project's folder with a finished run.

    images: the only images to show.
    """
    number = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["round"]
    frame, read = records.to_frame, records.read_table
    history = read_history(records.round_folder(number) / "history")
    sentences = frame(read(records.INDEX.refs, records.REFS)).merge(
        frame(read(records.INDEX.images, records.IMAGES)), on="image_id"
    )
    sentences = sentences.set_index("sent_id")
    allowed = sentences.index if images is None else sentences.index[sentences["image_id"].isin(images)]
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
    labels = labels[labels["sent_id"].isin(allowed)]
    for accepted, verdict in ((True, "accepted"), (False, "rejected")):
        row = middle(labels[labels["accepted"] == accepted], "accept_prob")
        image, panels, true = common(row["sent_id"])
        mask, keep = (decode_rle(row[name], row["height"], row["width"]) for name in ("rle_counts", "keep_rle"))
        shown = overlays.with_kept(image, mask, keep) if accepted else overlays.with_mask(image, mask)
        panels += [("label, kept pixels" if accepted else "label", shown)]
        panels += [("label against truth", overlays.with_errors(image, mask, true))]
        title = f"unlabeled: “{sentences.at[row['sent_id'], 'sentence']}”, {verdict} ({row['accept_prob']:.2f})"
        yield int(sentences.at[row["sent_id"], "image_id"]), title, panels
    scored = frame(read(records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    scored = scored[scored["sent_id"].isin(allowed)]
    scored = scored[(scored["method"] == f"round_{number}") & (scored["split"] == "test")]
    predictions = frame(history.predictions)
    predictions = predictions[(predictions["model"] == f"round_{number}") & predictions["with_prior"]]
    for found in (True, False):
        row = middle(scored[(scored["iou"] >= POSITIVE_IOU) == found], "iou")
        image, panels, true = common(row["sent_id"])
        mask = decode_rle(predictions.set_index("sent_id").at[row["sent_id"], "rle_counts"], *true.shape)
        panels += [("prediction", overlays.with_mask(image, mask))]
        panels += [("prediction against truth", overlays.with_errors(image, mask, true))]
        title = f"test: “{sentences.at[row['sent_id'], 'sentence']}”, IoU {row['iou']:.2f}"
        yield int(sentences.at[row["sent_id"], "image_id"]), title, panels


def draw(rows: list[tuple[int, str, Panels]], path: Path) -> None:
    """Write a figure with a row for each sentence."""
    figure = Figure(figsize=(10, 2.35 * len(rows)), layout="constrained")
    parts: Any = figure.subfigures(len(rows), 1)
    for row, (part, (_, title, panels)) in enumerate(zip(parts, rows, strict=True)):
        part.suptitle(title, fontsize=10, x=0.01, ha="left")
        for axes, (name, picture) in zip(part.subplots(1, len(panels)), panels, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(name if row in (0, 2) else "", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    print(path.relative_to(ROOT))


def photos_with_credits(rows: list[dict[str, Any]]) -> str:
    """The picture in Markdown, with the source and the license of each photo; rows of COCO's `images`."""
    named = [f"[{row['id']}]({row['flickr_url']}) ({LICENSES[row['license']]})" for row in rows]
    return (
        "![Four sentences about photographs, from image and prior to the label or prediction](images/photos.png)\n\n"
        f"*Photos of COCO, by users of Flickr, with colors drawn over them: {', '.join(named)}. "
        "A script picks the examples (`python -m bench.picture --photos`).*"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", action="store_true", help="show the last run of bench.photos")
    if not parser.parse_args().photos:
        with contextlib.chdir(CLONE):
            rows = list(chosen())
        draw(rows, IMAGES / "example.png")
        return
    instances = json.loads((photos.photos_folder() / "instances.json").read_text(encoding="utf-8"))
    allowed = {row["id"]: row for row in instances["images"] if row.get("license") in LICENSES}
    run = photos.WORK / "worker_0"
    if yaml.safe_load((run / "params.yaml").read_text(encoding="utf-8"))["select"]["method"] != "reinforce":
        raise SystemExit("no picture: the last run of bench.photos is not of reinforce; run it again with that method")
    with contextlib.chdir(run):
        rows = list(chosen(set(allowed)))
    draw(rows, IMAGES / "photos.png")
    shown = dict.fromkeys(image_id for image_id, _, _ in rows)
    docs.put(photos.DOCUMENT, CREDITS, photos_with_credits([allowed[image_id] for image_id in shown]))


if __name__ == "__main__":
    main()
