"""Time and memory of the pieces that read all sentences, at 1, 10 and 100 times the default dataset.

    python -m bench.scale [--times 1 10 100] [--only ingest load ...] [--again]

The default pipeline's first stages run once, with simulated priors rendered as boxes. Their tables are repeated under
new ids, with predictions and pseudo-labels that are the true masks, moved. Each piece runs in its own process, which
imports first: CPU seconds (user and system) and peak resident memory (getrusage) before and after. Appends a row a
piece and size to bench/results/scale.jsonl as it is measured, skips those that are stored unless --again, and writes a
table of docs/full_size.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import docs

if TYPE_CHECKING:  # they are slow to import, and the memory of this process would be a child's first peak
    import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "scale"
RESULTS = ROOT / "bench" / "results" / "scale.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "full_size.md", "scale"
TIMES = (1, 10, 100)
LAST_ROUND = 2
IDS = ("image_id", "ref_id", "ann_id", "sent_id")
MOVED_PX = 3
BATCH = 16
FIRST_STAGES = ("refshapes", "ingest", "split", "query", "priors", "proposals")
PARAMS: dict[str, dict[str, object]] = {"priors": {"backend": "simulated"}, "proposals": {"renderer": "box"}}
"""Changes to params.yaml."""


def stage(name: str, *arguments: str) -> Callable[[], object]:
    """A stage's main function with its arguments, in the current folder."""
    from importlib import import_module

    sys.argv = [name, *arguments]
    main: Callable[[], object] = import_module(f"stages.{name}").main
    return main


# ---- the pieces: each imports, and returns what is measured


def ingest() -> Callable[[], object]:
    return stage("ingest")


def split() -> Callable[[], object]:
    return stage("split")


def proposals() -> Callable[[], object]:
    return stage("proposals")


def load() -> Callable[[], object]:
    """Sentences, priors and soft maps of all training pairs, as each training and `select` start."""
    from l2l_core.config import load_params
    from l2l_core.data.load import pairs_of

    params = load_params()
    return lambda: [pairs_of(params, role) for role in ("labeled", "unlabeled")]


def streams() -> Callable[[], object]:
    """Labels and the last round's pseudo-labels with their pixel weights, as `retrain` starts."""
    from l2l_core.config import load_params
    from l2l_core.evaluation.history import read_history  # noqa: F401  (imports pandas)
    from l2l_core.training.runs import round_streams

    params = load_params()
    return lambda: round_streams(params, Path("data/distilled/history/pseudo_labels.parquet"))


def epochs() -> Callable[[], object]:
    """The rows of the steps of two epochs."""
    from l2l_core.training.streams import epoch_rows

    count = counts()["sentences"]
    return lambda: [epoch_rows(count, BATCH, 0, step) for step in range(2 * count // BATCH)]


def evaluate() -> Callable[[], object]:
    return stage("evaluate", "--round", str(LAST_ROUND))


def report() -> Callable[[], object]:
    return stage("report", "--round", str(LAST_ROUND))


@dataclass(frozen=True)
class Piece:
    """What is measured, what one item of it is, and how many items it has by what a project holds."""

    prepare: Callable[[], Callable[[], object]]
    item: str
    items: Callable[[dict[str, int]], int]
    after: str | None = None  # piece whose outputs it reads


PIECES = {
    "ingest": Piece(ingest, "sentence", lambda held: held["sentences"]),
    "split": Piece(split, "sentence", lambda held: held["sentences"], after="ingest"),
    "proposals": Piece(proposals, "sentence", lambda held: held["sentences"]),
    "load": Piece(load, "sentence", lambda held: held["labeled"] + held["unlabeled"]),
    "streams": Piece(streams, "sentence", lambda held: held["labeled"] + held["unlabeled"]),
    "epochs": Piece(epochs, "step", lambda held: 2 * held["sentences"] // BATCH),
    "evaluate": Piece(evaluate, "sentence", lambda held: held["eval"] + held["unlabeled"]),
    "report": Piece(report, "sentence", lambda held: held["sentences"], after="evaluate"),
}
SHOWN = {
    "ingest": "`ingest`",
    "split": "`split`",
    "proposals": "`proposals`, boxes",
    "load": "start of a training or `select`: pairs with soft maps",
    "streams": "start of `retrain`: labels and pseudo-labels with weights",
    "epochs": "order of the samples, per step",
    "evaluate": "`evaluate`, nine methods and two rounds of pseudo-labels",
    "report": "`report`",
}
"""Names in the table."""


def counts() -> dict[str, int]:
    """Images and sentences of the project in the current folder, all and by role."""
    held: dict[str, int] = json.loads(Path("counts.json").read_text())
    return held


# ---- the projects


def base() -> None:
    """Run the first stages in the folder `1x`, where they do not exist."""
    import yaml

    from bench.params import merged

    folder = WORK / "1x"
    if (folder / "counts.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(params, PARAMS)))
    (folder / "vlm").symlink_to(ROOT / "vlm")
    for name in FIRST_STAGES:
        subprocess.run([sys.executable, "-m", f"stages.{name}"], cwd=folder, env=environment(), check=True)
    os.chdir(folder)
    write_history()
    write_counts()


def project(times: int) -> None:
    """Write the folder `<times>x`: the tables of `1x`, repeated, where it does not exist."""
    from l2l_core.artifacts import records

    folder, source = WORK / f"{times}x", WORK / "1x"
    if (folder / "counts.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    schemas = {
        records.INDEX.images: records.IMAGES,
        records.INDEX.refs: records.REFS,
        records.INDEX.objects: records.OBJECTS,
        records.INDEX.masks: records.MASKS,
        records.SPLIT_PATH: records.SPLIT,
        records.LABELED_MASKS_PATH: records.MASKS,
        records.PRIORS_PATH: records.PRIORS,
        records.PROPOSALS_PATH: records.PROPOSALS,
        Path("data/distilled/history/predictions.parquet"): records.PREDICTIONS,
        Path("data/distilled/history/pseudo_labels.parquet"): records.PSEUDO_LABELS,
    }
    for path, schema in schemas.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        table = repeated(records.read_table(source / path, schema), times)
        records.write_table(table, folder / path, schema)
    for name in ("params.yaml", "metrics", "data/proposals/rendering.json", "data/distilled/history/training.csv"):
        copied = shutil.copytree if (source / name).is_dir() else shutil.copy
        copied(source / name, folder / name)
    shutil.copy(source / "data/distilled/history/policy.csv", folder / "data/distilled/history/policy.csv")
    (folder / "data" / "refshapes").symlink_to(source / "data" / "refshapes")
    os.chdir(folder)
    write_counts()


def repeated(table: pa.Table, times: int) -> pa.Table:
    """`times` copies of a table; each has its own ids."""
    import pyarrow as pa
    import pyarrow.compute as pc

    copies = []
    for copy in range(times):
        one = table
        for name in set(IDS) & set(table.schema.names):
            place = table.schema.get_field_index(name)
            one = one.set_column(place, table.schema.field(name), pc.add(table[name], copy * 10**7))
        copies.append(one)
    return pa.concat_tables(copies)


def data_set(times: int) -> None:
    """Write the folder `ingest-<times>x`: the dataset's files, with images as links, where it does not exist."""
    folder, source = WORK / f"ingest-{times}x", WORK / "1x"
    if (folder / "counts.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "data" / "refshapes", folder / "data" / "refshapes", ignore=lambda *_: ["images"])
    shutil.copy(source / "params.yaml", folder)
    found = folder / "data" / "refshapes"
    (found / "images").mkdir()
    instances, refs = (json.loads((found / name).read_text()) for name in ("instances.json", "refs(refshapes).json"))
    written: dict[str, list[Any]] = {"images": [], "annotations": [], "refs": []}
    for copy in range(times):
        shift = copy * 10**7
        for image in instances["images"]:
            name = f"{copy}_{image['file_name']}"
            (found / "images" / name).symlink_to(source / "data" / "refshapes" / "images" / image["file_name"])
            written["images"].append(image | {"id": image["id"] + shift, "file_name": name})
        for row in instances["annotations"]:
            written["annotations"].append(row | {"id": row["id"] + shift, "image_id": row["image_id"] + shift})
        for ref in refs:
            ids = {name: ref[name] + shift for name in ("ref_id", "ann_id", "image_id")}
            texts = [sentence | {"sent_id": sentence["sent_id"] + shift} for sentence in ref["sentences"]]
            written["refs"].append(ref | ids | {"sentences": texts})
    instances |= {"images": written["images"], "annotations": written["annotations"]}
    (found / "instances.json").write_text(json.dumps(instances))
    (found / "refs(refshapes).json").write_text(json.dumps(written["refs"]))
    held = json.loads((source / "counts.json").read_text())
    (folder / "counts.json").write_text(json.dumps({name: times * count for name, count in held.items()}))


def write_counts() -> None:
    """counts.json of the project in the current folder."""
    from collections import Counter

    from l2l_core.artifacts import records

    roles = Counter(records.read_table(records.SPLIT_PATH, records.SPLIT)["role"].to_pylist())
    images = records.read_table(records.INDEX.images, records.IMAGES, ["image_id"]).num_rows
    Path("counts.json").write_text(json.dumps({"images": images, "sentences": roles.total(), **roles}))


def write_history() -> None:
    """Predictions of all models and pseudo-labels of all rounds: the true masks, moved."""
    import numpy as np

    from l2l_core.artifacts import records
    from l2l_core.core.masks import decode_rle, encode_rle
    from l2l_core.evaluation.history import POLICY_COLUMNS, TRAINING_COLUMNS

    folder = records.DISTILLED_FOLDER / "history"
    folder.mkdir(parents=True, exist_ok=True)
    refs = records.to_frame(records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "ann_id"]))
    masks = records.to_frame(records.read_table(records.INDEX.masks, records.MASKS))
    roles = records.to_frame(records.read_table(records.SPLIT_PATH, records.SPLIT))
    soft = records.to_frame(records.read_table(records.PROPOSALS_PATH, records.PROPOSALS, ["sent_id", "soft"]))
    rows = roles.merge(refs, on="sent_id").merge(masks, on="ann_id").merge(soft, on="sent_id")
    rounds = range(LAST_ROUND + 1)
    ways = [("supervised", False), *((f"round_{k}", flag) for k in rounds for flag in (True, False))]
    predictions: list[dict[str, object]] = []
    labels: list[dict[str, object]] = []
    for row in rows.itertuples():
        true = decode_rle(row.rle_counts, row.height, row.width)
        found = {"sent_id": row.sent_id, "height": row.height, "width": row.width}
        found |= {"rle_counts": encode_rle(np.roll(true, MOVED_PX, (0, 1)))}
        if row.role == "eval":
            both = [*ways, ("distilled", False)]
            predictions += [found | {"model": model, "with_prior": flag} for model, flag in both]
        if row.role == "unlabeled":
            label = found | {"candidate": "teacher", "keep_rle": encode_rle(np.ones_like(true)), "weight": row.soft}
            label |= {"accept_prob": 0.75, "prior_iou": 0.5, "confidence": 0.9, "accepted": True, "method": "reinforce"}
            labels += [label | {"round": number} for number in rounds if number]
    found_all = records.make_table(predictions, records.PREDICTIONS)
    records.write_table(found_all, folder / "predictions.parquet", records.PREDICTIONS)
    table = records.make_table(labels, records.PSEUDO_LABELS)
    records.write_table(table, folder / "pseudo_labels.parquet", records.PSEUDO_LABELS)
    models = ["supervised", "distilled", *(f"round_{k}" for k in rounds)]
    curve = [",".join(TRAINING_COLUMNS), *(f"{model},20,1.5,0.6,0.9,0.001" for model in models)]
    (folder / "training.csv").write_text("\n".join(curve) + "\n")
    (folder / "policy.csv").write_text(",".join(POLICY_COLUMNS) + "\n")


# ---- measuring


def environment() -> dict[str, str]:
    """Of all processes: the current folder is a project below bench/work, whose code is this repository's."""
    others = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    return others | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def child(*arguments: str, folder: Path = ROOT) -> str:
    """The output of this script, run in a separate process."""
    command = [sys.executable, "-m", "bench.scale", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, check=True).stdout


def work(name: str) -> None:
    """In a separate process, in a project's folder: print what the piece took."""
    call = PIECES[name].prepare()
    held = counts()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    result = call()
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    del result  # held until here
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print()
    print(
        json.dumps(
            {
                "images": held["images"],
                "sentences": held["sentences"],
                "item": PIECES[name].item,
                "items": PIECES[name].items(held),
                "wall_s": round(wall, 3),
                "cpu_s": round(cpu, 3),
                "imported_mb": round(before.ru_maxrss / 1024),
                "peak_mb": round(after.ru_maxrss / 1024),
            }
        )
    )


def measure(name: str, times: int) -> dict[str, Any]:
    """A row of the piece at a size. Builds the project first."""
    child("--build", "1")
    alone = name in ("ingest", "split")
    child("--build-dataset" if alone else "--build", str(times))
    folder = WORK / (f"ingest-{times}x" if alone else f"{times}x")
    earlier = PIECES[name].after
    if earlier and not (folder / f"{earlier}.done").exists():
        child("--work", earlier, folder=folder)
        (folder / f"{earlier}.done").touch()
    found = json.loads(child("--work", name, folder=folder).splitlines()[-1])
    (folder / f"{name}.done").touch()
    return {"bench": "scale", "piece": name, "times": times} | found


def stored() -> list[dict[str, Any]]:
    """All rows; of a piece and size the last one counts."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: CPU time an item and peak memory by size, and what a thousand sentences add to the memory."""
    found = {(row["piece"], row["times"]): row for row in rows}
    sizes = sorted({times for _, times in found})
    sentences = {row["times"]: row["sentences"] for row in found.values()}
    shown: list[list[object]] = []
    for name in PIECES:
        of_piece = [found[name, times] for times in sizes if (name, times) in found]
        if not of_piece:
            continue
        by_size = {row["times"]: row for row in of_piece}
        costs = [
            f"{1000 * by_size[times]['cpu_s'] / by_size[times]['items']:.3g}" if times in by_size else ""
            for times in sizes
        ]
        peaks = [f"{by_size[times]['peak_mb']:,}" if times in by_size else "" for times in sizes]
        shown.append([SHOWN[name], *costs, *peaks, f"{added_kb(of_piece):.2g}" if len(of_piece) > 1 else ""])
    head = ["what", *(f"ms, {sentences[times]:,}" for times in sizes)]
    head += [*(f"MB, {sentences[times]:,}" for times in sizes), "KB each"]
    commits = ", ".join(sorted({row["commit"] for row in found.values()}))
    return f"{docs.markdown(head, shown)}\n\nOne thread; {rows[-1]['device']}, commits {commits}."


def added_kb(rows: list[dict[str, Any]]) -> float:
    """Kilobytes of peak memory that each further sentence adds, from the smallest to the largest size."""
    small, large = rows[0], rows[-1]
    return 1024 * (large["peak_mb"] - small["peak_mb"]) / (large["sentences"] - small["sentences"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, nargs="+", default=list(TIMES), help="sizes, in copies of the dataset")
    parser.add_argument("--only", nargs="+", choices=list(PIECES), default=list(PIECES), help="pieces to measure")
    parser.add_argument("--again", action="store_true", help="also measure what is stored")
    for name in ("--work", "--build", "--build-dataset"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    if arguments.build_dataset:
        data_set(int(arguments.build_dataset))
        return
    if arguments.build:
        base()
        project(int(arguments.build))
        return
    common = json.loads(subprocess.check_output([sys.executable, "-c", COMMON], cwd=ROOT, text=True))
    done = {(row["piece"], row["times"]) for row in stored()}
    for times in arguments.times:
        for name in arguments.only:
            if (name, times) in done and not arguments.again:
                continue
            row = measure(name, times) | common
            print(json.dumps(row), flush=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    shown = table(stored())
    docs.put(DOCUMENT, MARK, shown)
    print(shown)


COMMON = """
import json, subprocess
from bench.capabilities import capabilities
commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
print(json.dumps({"commit": commit} | capabilities()))
"""
"""In another process: PyTorch's memory would be the first peak of every child."""


if __name__ == "__main__":
    main()
