"""The example dataset matches its script, and ingest reads it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle
from l2l_core.datasets.jsonl import read_jsonl
from l2l_core.mllm.replay import load_recorded

EXAMPLES = Path(__file__).parents[1] / "examples"
TABLETOP = EXAMPLES / "tabletop"


def test_script_reproduces_the_stored_example(tmp_path):
    subprocess.run([sys.executable, EXAMPLES / "draw_tabletop.py", tmp_path / "tabletop"], check=True)
    stored = [EXAMPLES / "tabletop_responses.jsonl", *TABLETOP.rglob("*")]
    names = sorted(path.relative_to(EXAMPLES) for path in stored if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for name in names:
        if name.suffix == ".jsonl":
            assert (tmp_path / name).read_text() == (EXAMPLES / name).read_text()
        else:  # JPEG codecs differ in single levels
            drawn, stored = (np.asarray(Image.open(folder / name), dtype=float) for folder in (tmp_path, EXAMPLES))
            assert np.abs(drawn - stored).mean() < 2


def test_ingest_reads_the_example():
    index = read_jsonl(TABLETOP / "pairs.jsonl")
    refs = index.refs.to_pylist()
    assert index.images.num_rows == 12
    assert Counter(row["split"] for row in refs) == {"train": 20, "val": 7}
    assert sum(row["ann_id"] >= 0 for row in refs) == 16


def test_masks_cover_objects_of_the_named_color():
    """The mean color of a mask, against the color that its sentence names."""
    hue = {"red": (0, 1), "orange": (0, 2), "yellow": (0, 2), "green": (1, 0), "blue": (2, 0)}  # higher, lower channel
    index = read_jsonl(TABLETOP / "pairs.jsonl")
    paths = {row["image_id"]: row["file_name"] for row in index.images.to_pylist()}
    masks = {row["ann_id"]: row for row in index.masks.to_pylist()}
    seen = 0
    for ref in index.refs.to_pylist():
        named = [word for word in ref["sentence"].split() if word in hue]
        if ref["ann_id"] in masks and named:
            mask = masks[ref["ann_id"]]
            pixels = np.asarray(Image.open(paths[ref["image_id"]]))[decode_rle(mask["rle_counts"], 120, 160)]
            more, less = hue[named[0]]
            assert pixels[:, more].mean() > pixels[:, less].mean() + 20, ref["sentence"]
            seen += 1
    assert seen > 8


def test_recorded_responses_are_boxes_near_the_masks():
    index = read_jsonl(TABLETOP / "pairs.jsonl")
    refs, images = (records.to_frame(table) for table in (index.refs, index.images))
    responses = load_recorded(EXAMPLES / "tabletop_responses.jsonl", refs, images, "auto")
    assert len(responses) == 26
    texts = pd.Series({sent_id: response.raw_text for (sent_id, _), response in responses.items()})
    assert texts.str.contains("null").sum() == 1
    off = [
        np.abs(np.array(json.loads(texts[row.sent_id])["bbox"]) - row.bbox).max()
        for row in refs.itertuples()
        if row.bbox is not None and row.sent_id in texts
    ]
    assert sorted(off)[-1] > 20  # a box of another object
    assert sorted(off)[-2] <= 6
