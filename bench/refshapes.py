"""What RefShapes is: shortcuts that would find the target, its words and styles, how long it takes to draw.

    python -m bench.refshapes              (about a minute)
    python -m bench.refshapes --table      (the table of the stored results again)

Draws the dataset of bench/benchmark.yaml below bench/work. Writes bench/results/refshapes.jsonl, one JSON object a
measure, and their table into docs/data.md. `seconds` is CPU time of one process; shares are of sentences.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from bench import docs
from bench.params import BENCHMARK
from l2l_core.config import RefShapesParams
from l2l_core.refshapes.dataset import write_refshapes
from l2l_core.refshapes.solver import COLOR_WORDS, SHAPE_WORDS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "work" / "refshapes"
RESULTS = ROOT / "bench" / "results" / "refshapes.jsonl"

DOCUMENT = ROOT / "docs" / "data.md"

Words = Mapping[str, tuple[str, ...]]
Guess = Callable[[str, Words, str], str | None]
ATTRIBUTES: dict[str, Words] = {"color": COLOR_WORDS, "shape": SHAPE_WORDS}


def draw() -> float:
    """Draw the benchmark's dataset anew; CPU seconds."""
    started = time.process_time()
    write_refshapes(FOLDER, RefShapesParams.model_validate(BENCHMARK["refshapes"]))
    return time.process_time() - started


def load() -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Sentences (image_id, ann_id, split, style, sentence), objects (image_id, ann_id, color, shape), version."""
    instances = json.loads((FOLDER / "instances.json").read_text(encoding="utf-8"))
    refs = json.loads((FOLDER / "refs(refshapes).json").read_text(encoding="utf-8"))
    sentences = pd.DataFrame(
        {key: ref[key] for key in ("image_id", "ann_id", "split")} | {"style": s["style"], "sentence": s["sent"]}
        for ref in refs
        for s in ref["sentences"]
    )
    shapes = {row["id"]: row["name"] for row in instances["categories"]}
    objects = pd.DataFrame(
        {
            "image_id": row["image_id"],
            "ann_id": row["id"],
            "color": row["attributes"]["color"],
            "shape": shapes[row["category_id"]],
        }
        for row in instances["annotations"]
    )
    return sentences, objects, instances["info"]["version"]


def first_word(sentence: str, words: Words, _own: str) -> str | None:
    """The first color (or shape) that is named, whatever it is said of."""
    return next((name for word in sentence.split() for name, forms in words.items() if word in forms), None)


def own_word(sentence: str, words: Words, own: str) -> str | None:
    """The target's own color (or shape), if it is named: what nobody knows who does not understand the sentence."""
    return own if set(words[own]) & set(sentence.split()) else None


def shortcut(sentences: pd.DataFrame, objects: pd.DataFrame, attributes: tuple[str, ...], guess: Guess) -> float:
    """How often a random pick among the objects that fit is the target; among all where none is named or fits."""
    by_image = dict(list(objects.groupby("image_id")))
    right = []
    for row in sentences.itertuples():
        scene = by_image[row.image_id]
        target = scene[scene["ann_id"] == row.ann_id].iloc[0]
        fitting = scene
        for attribute in attributes:
            named = guess(row.sentence, ATTRIBUTES[attribute], target[attribute])
            some = fitting[fitting[attribute] == named] if named else fitting
            fitting = some if len(some) else fitting
        right.append((fitting["ann_id"] == row.ann_id).sum() / len(fitting))
    return sum(right) / len(right)


def measures(seconds: float) -> list[dict[str, object]]:
    sentences, objects, version = load()
    is_train = sentences["split"] == "train"
    train, held_out = sentences[is_train], sentences[~is_train]
    found: list[dict[str, object]] = [{"measure": "draw", "seconds": round(seconds, 1)}]
    for name, attributes in (
        ("any object", ()),
        ("color", ("color",)),
        ("shape", ("shape",)),
        ("color and shape", ("color", "shape")),
    ):
        shares = {
            rule: round(shortcut(train, objects, attributes, guess), 3)
            for rule, guess in (("first_named", first_word), ("own", own_word))
        }
        found.append({"measure": "shortcut", "matches": name, "sentences": len(train)} | shares)
    words = {word for sentence in sentences["sentence"] for word in sentence.split()}
    found.append({"measure": "vocabulary", "sentences": len(sentences), "words": len(words)})
    seen = held_out["sentence"].isin(set(train["sentence"])).mean()
    found.append({"measure": "held_out_seen_in_train", "sentences": len(held_out), "share": round(seen, 3)})
    for style, share in sentences["style"].value_counts(normalize=True).sort_index().items():
        found.append({"measure": "style", "style": style, "sentences": len(sentences), "share": round(share, 3)})
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    common = {"bench": "refshapes", "dataset": f"refshapes-{version}", "device": platform.machine(), "commit": commit}
    return [common | row for row in found]


def table(rows: pd.DataFrame) -> str:
    """Markdown of the stored results."""
    by_measure = dict(list(rows.groupby("measure")))
    shares: list[tuple[str, float]] = [
        ("sentence of val or test occurs in train", by_measure["held_out_seen_in_train"]["share"].item())
    ]
    shares += [(f"style {row.style}", row.share) for row in by_measure["style"].itertuples()]
    for row in by_measure["shortcut"].itertuples():
        if row.matches == "any object":
            shares.append(("target found: any object", row.first_named))
        else:
            shares.append((f"target found: first {docs.current_name(row.matches)} that is named", row.first_named))
            shares.append((f"target found: its own {docs.current_name(row.matches)}, where named", row.own))
    facts: list[list[object]] = [
        ["CPU seconds to draw it", f"{by_measure['draw']['seconds'].item():.0f}"],
        ["different words", f"{by_measure['vocabulary']['words'].item():.0f}"],
    ]
    facts += [[name, f"{100 * share:.1f} %"] for name, share in shares]
    return docs.markdown([rows["dataset"].iloc[0], ""], facts)


def main() -> None:
    if "--table" not in sys.argv:
        rows = measures(draw())
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = table(pd.read_json(RESULTS, lines=True))
    docs.put(DOCUMENT, "refshapes", text)
    print(text)


if __name__ == "__main__":
    main()
