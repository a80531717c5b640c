"""Which selection of pseudo-labels pays on photographs: real photos and masks, priors of known quality.

    L2L_REAL_DATA=<folder> python -m bench.photos [--rates 0.1] [--priors qwen2.5-vl-7b-box] [--seeds 0 1 2]
                                                  [--methods all reinforce] [--rounds 2] [--workers 2] [--threads 1]
    python -m bench.photos --smoke     (a few steps on a few photos, into bench/work/: shows that everything works)
    python -m bench.photos --table     (only the table of the stored results)

It works like bench.label_efficiency, whose runs, clones and rows it uses: what is stored is not run again, and after a
kill the same call goes on. It needs `make small`, and COCO photos below L2L_REAL_DATA:

    coco_photos/images/         the photos that bench/photos.yaml lists
    coco_photos/instances.json  COCO's instances of these photos
    coco_photos/refs.json       human sentences: image_id, ann_id, dataset, sentences; used for test_human alone

**Data.** `l2l import coco --generate-sentences` writes the sentences of training, val and test_generated. The splits
are lists of photos in bench/photos.yaml. test_human has the sentences of RefCOCO, RefCOCO+ and RefCOCOg.

**Priors.** Simulated boxes of two error models, as a box and by GrabCut, and `masks`: true masks, degraded to a mean
IoU of MASK_IOU, the published quality of a zero-shot pipeline. WRONG_SHARE of the sentences get the mask of another
object, of the same kind where there is one. All others get the true mask with a moved border: a pixel is inside if its
distance to the border (positive inside) plus smooth noise is positive. The noise has NOISE_CELLS independent values
along each side of a region of twice the object's box, and a standard deviation in proportion to the object's size. One
factor for all masks, found by bisection, gives the wanted IoU.

bench/results/photos.jsonl holds rows with the keys of bench.label_efficiency and

    split                      val, test_generated or test_human
    low, high                  95 % interval of miou by bootstrap over the photos of the split
    distilled_low, .._high     the same of distilled_miou, which rows of reinforce alone have

**Time.** A training step takes about 4.9 CPU-seconds (16 images of 256 px, fp32, AVX2). One seed of all methods at one
label rate and prior takes 2,760 of them, 3.8 CPU-hours, and about 1.5 CPU-hours (estimated) for ten selections, all
predictions and the starts of the stages: some 3 hours on 2 cores. The default call, three seeds of five priors at 10 %,
takes about 40 hours there; with --rates 0.05 0.1 0.2, three times as long. Trainings are short therefore: a round has
120 steps, as many as the warm-up. A CUDA device is used where PyTorch sees one; each row names its device.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from bench import docs
from bench import label_efficiency_page as page
from bench.label_efficiency import ROOT, Bench, Row, Run, carry_out, make_parser, planned, stored
from bench.params import merged
from l2l_core.artifacts import records
from l2l_core.core.files import atomic_dir
from l2l_core.core.masks import BoolMask, decode_rle, encode_rle, segmentation_to_rle
from l2l_core.core.seeding import generator
from l2l_core.evaluation.error_analysis import mean_interval
from l2l_core.evaluation.evaluate import DISTILLED
from l2l_core.mllm.error_model import ERROR_MODELS

SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
RESULTS = ROOT / "bench" / "results" / "photos.jsonl"
CURVES = ROOT / "bench" / "results" / "photos_curves.jsonl"
WORK = ROOT / "bench" / "work" / "photos"
DOCUMENT, MARK = ROOT / "docs" / "results.md", "photos"

METHODS = (
    *("warmup", "labels_only", "fully_supervised", "all"),
    *("ranksum_sharpened", "ranksum_overlap", "agreement_overlap", "reinforce"),
)
DISTILLING = "reinforce"
"""The method that trains a model for use without priors: others would take a fifth more time."""
SMOKE_METHODS = ("warmup", "reinforce")
MASKS = "masks"
SMOKE_PRIORS = ("qwen2.5-vl-7b-box", MASKS)
SPLIT_NAMES = {"train": "train", "val": "val", "test_generated": "test", "test_human": "testA"}
"""Splits of bench/photos.yaml, and their names in the dataset."""
SHOWN_SPLITS = tuple(SPLIT_NAMES)[1:]

MASK_IOU = 68.5
WRONG_SHARE = ERROR_MODELS["qwen2.5-vl-7b"].wrong_object_rate
NOISE_CELLS = 6


@dataclass(frozen=True)
class PhotoRun(Run):
    """One configuration of the pipeline on the photos; `preset` is one of the priors of bench/photos.yaml."""

    images: str = ""  # folder of the photos
    smoke: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Sections that replace those of params.yaml in every run."""
        own = {"ingest": {"images": self.images}} | (SETTINGS["smoke"] if self.smoke else {})
        return merged(SETTINGS["params"], own)

    def params(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The content of params.yaml. Only `reinforce` distills a model for its rows."""
        found = super().params(defaults)
        return found if self.method == DISTILLING else merged(found, {"distill": {"steps": 1}})

    @property
    def prior_settings(self) -> dict[str, Any]:
        """Sections that make the priors of `preset`."""
        found: dict[str, Any] = SETTINGS["priors"][self.preset]
        own = {"replay_file": f"data/photo_masks/{self.seed}.jsonl"} if self.preset == MASKS else {"seed": self.seed}
        return found | {"priors": found["priors"] | own}

    def rows(self, folder: Path, params: dict[str, Any]) -> list[Row]:
        """The rows of the base class, with the names of the splits and intervals over the photos."""
        intervals = read_intervals(folder)
        names = {own: name for name, own in SPLIT_NAMES.items()}
        scored = {result: name for name, result in self.results.items()}
        found = []
        for row in super().rows(folder, params):
            low, high = intervals[row["split"], scored[row["method"], row["round"]]]
            row |= {"split": names[row["split"]], "low": low, "high": high}
            if self.method != DISTILLING:
                row.pop("distilled_miou", None)
            elif row["distilled_miou"] is not None:
                low, high = intervals[SPLIT_NAMES[row["split"]], DISTILLED]
                row |= {"distilled_low": low, "distilled_high": high}
            found.append(row)
        return found


def read_intervals(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """95 % interval of the mIoU in percent by bootstrap over photos, of each split and method of an evaluation."""
    table = records.to_frame(records.read_table(folder / records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    refs = records.read_table(folder / records.INDEX.refs, records.REFS, ["sent_id", "image_id"])
    table = table.merge(records.to_frame(refs), on="sent_id")
    found = {}
    for (split, method), rows in table.groupby(["split", "method"]):
        low, high = mean_interval(100 * rows["iou"].to_numpy(np.float64), rows["image_id"].to_numpy(), 0)
        found[str(split), str(method)] = round(low, 2), round(high, 2)
    return found


# ---- data ----


def listed_photos(smoke: bool) -> dict[int, str]:
    """image_id -> split."""
    splits: dict[str, list[int]] = SETTINGS["splits"]
    count = SETTINGS["smoke_photos"] if smoke else None
    return {image_id: split for split, ids in splits.items() for image_id in ids[:count]}


def prepare(real: Path, data: Path, smoke: bool, seeds: Sequence[int]) -> None:
    """Write the dataset to data/photos, and the degraded masks of each seed to data/photo_masks, where missing."""
    if not (data / "photos").exists():
        with atomic_dir(data / "photos") as folder:
            write_dataset(real, folder, listed_photos(smoke))
    masks = data / "photo_masks"
    masks.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        if not (masks / f"{seed}.jsonl").exists():
            lines = degraded_masks(data / "photos", seed)
            (masks / f"{seed}.new").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            (masks / f"{seed}.new").replace(masks / f"{seed}.jsonl")


def write_dataset(real: Path, folder: Path, photos: Mapping[int, str]) -> None:
    """The listed photos' objects and sentences in RefCOCO's layout, so that every annotated object is known."""
    whole = json.loads((real / "instances.json").read_text(encoding="utf-8"))
    instances = {
        "info": {"version": "1"},
        "images": [row for row in whole["images"] if row["id"] in photos],
        "annotations": [row for row in whole["annotations"] if row["image_id"] in photos],
        "categories": whole["categories"],
    }
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    refs = [*human_refs(real, photos), *generated_refs(real, folder, instances, photos)]
    sent_id = 0
    for ref_id, ref in enumerate(refs):
        for sentence in ref["sentences"]:
            sentence["sent_id"] = sent_id
            sent_id += 1
        ref |= {"ref_id": ref_id, "split": SPLIT_NAMES[photos[ref["image_id"]]]}
    (folder / "refs(photos).json").write_text(json.dumps(refs), encoding="utf-8")


def human_refs(real: Path, photos: Mapping[int, str]) -> Iterator[Row]:
    """The human sentences of test_human."""
    for ref in json.loads((real / "refs.json").read_text(encoding="utf-8")):
        if photos.get(ref["image_id"]) == "test_human":
            sentences = [{"sent": text, "style": ref["dataset"]} for text in ref["sentences"]]
            yield {"image_id": ref["image_id"], "ann_id": ref["ann_id"], "sentences": sentences}


def generated_refs(real: Path, folder: Path, instances: Row, photos: Mapping[int, str]) -> Iterator[Row]:
    """The generated sentences of all other splits, by object."""
    command = [sys.executable, "-m", "l2l_core", "import", "coco", str(folder / "instances.json")]
    command += ["--generate-sentences", "--images", str(real / "images"), "--out", str(folder / "generated")]
    subprocess.run(command, cwd=ROOT, check=True)
    sizes = {row["id"]: (row["height"], row["width"]) for row in instances["images"]}
    image_ids = {row["file_name"]: row["id"] for row in instances["images"]}
    objects = {}
    for row in instances["annotations"]:
        rle = segmentation_to_rle(row["segmentation"], *sizes[row["image_id"]])
        objects[row["image_id"], rle.decode()] = row["id"]
    refs: dict[int, Row] = {}
    path = folder / "generated" / "pairs.jsonl"
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        image_id = image_ids[Path(line["image"]).name]
        if photos[image_id] != "test_human":
            ann_id = objects[image_id, line["mask"]["counts"]]
            ref = refs.setdefault(ann_id, {"image_id": image_id, "ann_id": ann_id, "sentences": []})
            ref["sentences"].append({"sent": line["sentence"], "style": line["style"]})
    path.unlink()
    path.parent.rmdir()
    return iter(refs.values())


# ---- masks of known quality ----


@dataclass(frozen=True)
class Wobble:
    """What a degraded mask is made of, in a region of the image."""

    hw: tuple[int, int]  # of the image
    region: tuple[slice, slice]
    distance: NDArray[np.float16]  # [h, w] to the border in pixels, positive inside
    noise: NDArray[np.float16]  # [h, w] smooth, scaled by the object's size
    true: BoolMask  # [h, w] part of the true mask
    true_px: int  # of the whole true mask

    def moved(self, factor: float) -> BoolMask:
        """[h, w] the mask in its region; with its own border where nothing would remain."""
        moved = self.distance + np.float16(factor) * self.noise > 0
        return moved if moved.any() else self.distance > 0

    def iou(self, factor: float) -> float:
        """IoU of the degraded mask with the true one."""
        moved = self.moved(factor)
        shared = int((moved & self.true).sum())
        return shared / (int(moved.sum()) + self.true_px - shared)

    def rle(self, factor: float) -> bytes:
        """The degraded mask at the image's size."""
        whole = np.zeros(self.hw, dtype=bool)
        whole[self.region] = self.moved(factor)
        return encode_rle(whole)


def make_wobble(seen: BoolMask, true: BoolMask, draws: np.random.Generator) -> Wobble:
    """seen: [H, W] the mask to degrade, not empty; true: [H, W] the right one."""
    ys, xs = np.nonzero(seen)
    rows, columns = (
        slice(max(0, int(at.min()) - np.ptp(at) // 2 - 1), int(at.max()) + np.ptp(at) // 2 + 2) for at in (ys, xs)
    )
    inside = np.ascontiguousarray(seen[rows, columns]).astype(np.uint8)
    to_outside = cv2.distanceTransform(np.pad(inside, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]  # the image's edge is a border
    distance = to_outside - cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    cells = draws.standard_normal((NOISE_CELLS, NOISE_CELLS)).astype(np.float32)
    noise = cv2.resize(cells, inside.shape[::-1], interpolation=cv2.INTER_CUBIC) * math.sqrt(inside.sum())
    height, width = seen.shape
    near = true[rows, columns].copy()
    halves = distance.astype(np.float16), noise.astype(np.float16)
    return Wobble((height, width), (rows, columns), *halves, near, int(true.sum()))


def degraded_masks(dataset: Path, seed: int) -> list[Row]:
    """Replay lines of a degraded mask for every sentence of a dataset in RefCOCO's layout."""
    instances = json.loads((dataset / "instances.json").read_text(encoding="utf-8"))
    refs = json.loads((dataset / "refs(photos).json").read_text(encoding="utf-8"))
    sizes = {row["id"]: (row["height"], row["width"]) for row in instances["images"]}
    objects = {row["id"]: row for row in instances["annotations"] if not row["iscrowd"]}
    of_image: dict[int, list[int]] = {}
    for row in objects.values():
        of_image.setdefault(row["image_id"], []).append(row["id"])

    def mask_of(ann_id: int) -> BoolMask:
        height, width = sizes[objects[ann_id]["image_id"]]
        return decode_rle(segmentation_to_rle(objects[ann_id]["segmentation"], height, width), height, width)

    wobbles = {}
    for ref in refs:
        own = ref["ann_id"]
        others = [ann_id for ann_id in of_image[ref["image_id"]] if ann_id != own]
        alike = [ann_id for ann_id in others if objects[ann_id]["category_id"] == objects[own]["category_id"]]
        wrong, true = alike or others, mask_of(own)
        for sentence in ref["sentences"]:
            draws = generator("degraded mask", seed, sentence["sent_id"])
            is_wrong, place = draws.random() < WRONG_SHARE, draws.random()
            seen = mask_of(wrong[int(place * len(wrong))]) if is_wrong and wrong else true
            wobbles[sentence["sent_id"]] = make_wobble(seen if seen.any() else true, true, draws)
    factor = fitted_factor(list(wobbles.values()))
    return [
        {"sent_id": sent_id, "mask": {"size": list(wobble.hw), "counts": wobble.rle(factor).decode("ascii")}}
        for sent_id, wobble in wobbles.items()
    ]


def fitted_factor(wobbles: Sequence[Wobble]) -> float:
    """The factor of the noise with a mean IoU of MASK_IOU, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(10):
        factor = (low + high) / 2
        miou = 100 * float(np.mean([wobble.iou(factor) for wobble in wobbles]))
        low, high = (factor, high) if miou > MASK_IOU else (low, factor)
    return (low + high) / 2


# ---- page ----


def table(rows: pd.DataFrame) -> str:
    """Markdown: a table for each label rate and prior, a row for each method and round, means over the seeds."""
    if rows.empty:
        return "Not measured yet."
    parts = []
    for setting in page.settings(rows):
        chosen = page.rows_of(rows, setting)
        head = ["method", "round", "seeds", *(f"{split} mIoU (min to max)" for split in SHOWN_SPLITS)]
        head += ["val, without prior", "val, distilled", "test_human: 95 % over photos"]
        body: list[list[object]] = []
        for method, number, group in page.by_method(chosen):
            by_split = {split: group[group["split"] == split] for split in SHOWN_SPLITS}
            val, human = by_split["val"], by_split["test_human"]
            scores = [page.seed_range(part) for part in by_split.values()]
            more = [page.mean_of(val, name) for name in ("no_prior_miou", "distilled_miou")]
            interval = f"{page.mean_of(human, 'low')} to {page.mean_of(human, 'high')}"
            body.append([page.title_of(method), number, val["seed"].nunique(), *scores, *more, interval])
        devices, commits = (", ".join(sorted(chosen[name].unique())) for name in ("device", "commit"))
        parts += [f"### Photographs, {100 * setting[0]:g} % of the labels, {setting[1]}"]
        parts += [docs.markdown(head, body), f"Measured on {devices}; commits {commits}."]
    return "\n\n".join(parts)


def photos_folder() -> Path:
    """The folder of COCO photos. Raises SystemExit that says how to get them."""
    folder = Path(os.environ.get("L2L_REAL_DATA", "L2L_REAL_DATA")) / "coco_photos"
    if not (folder / "instances.json").is_file():
        raise SystemExit(
            f"{folder / 'instances.json'}: not found; set L2L_REAL_DATA to the folder that holds coco_photos/. COCO's "
            "photos are at http://images.cocodataset.org/train2017/<12 digits>.jpg (or val2017), their instances in "
            "annotations_trainval2017.zip there; bench/photos.yaml lists the photos, bench/photos.py the files"
        )
    return folder


def main() -> None:
    parser = make_parser(__doc__, 0.1, METHODS, 2)
    parser.add_argument("--priors", nargs="+", choices=SETTINGS["priors"], default=list(SETTINGS["priors"]))
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few photos; rows go to bench/work/")
    arguments = parser.parse_args()
    work, results, curves = WORK, RESULTS, CURVES
    if arguments.smoke:
        work = ROOT / "bench" / "work" / "photos_smoke"
        results, curves = work / "photos.jsonl", work / "photos_curves.jsonl"
        arguments.methods, arguments.priors = list(SMOKE_METHODS), list(SMOKE_PRIORS)
        arguments.seeds, arguments.rates, arguments.rounds = [0], [0.5], 1
    failed = []
    if not arguments.table:
        real, data = photos_folder(), work / "data"
        prepare(real, data, arguments.smoke, arguments.seeds)
        make = partial(PhotoRun, images=str((real / "images").resolve()), smoke=arguments.smoke)
        runs = planned(arguments.methods, arguments.rates, arguments.priors, arguments.seeds, arguments.rounds, make)
        failed = carry_out(Bench(work, results, curves, data), runs, arguments)
    text = table(pd.DataFrame(stored(results)))
    if arguments.smoke:
        print(text)
    else:
        docs.put(DOCUMENT, MARK, text)
    if failed:
        raise SystemExit("failed or not started: " + ", ".join(map(str, failed)))


if __name__ == "__main__":
    main()
