"""The command `l2l`: check a configuration, import annotations, run the pipeline, read scores, predict and export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from l2l_core.artifacts.records import METRICS_PATH, REPORT_PATH, read_json
from l2l_core.artifacts.rounds import latest_round, model_folder
from l2l_core.core.files import end_on_sigterm, staged_output
from l2l_core.errors import InputError, exit_code

if TYPE_CHECKING:
    import pandas as pd

    from l2l_core.datasets.importers.entries import Imported

WARMUP = "round 0 (warm-up)"
SCORES = {"miou": "mIoU", "oiou": "oIoU", "pr50": "Pr@0.5", "pr70": "Pr@0.7", "pr90": "Pr@0.9"}

WORKFLOW = ("fetch", "import", "check", "run", "scores", "compare", "predict", "serve", "export", "doctor", "stage")
"""The order of the commands in the help."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=[*WORKFLOW, *self.commands].index)


# Commands import what they need when they run: `--help` needs none of it, and torch alone takes seconds.
app = typer.Typer(
    cls=_InOrder, help=__doc__, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(export_app, name="export", help="Write pseudo-labels or the network for other tools.")

Round = Annotated[
    int | None, typer.Option("--round", min=1, help="round to export (default: the latest of the last run)")
]
Polygons = Annotated[bool, typer.Option("--polygons", help="masks as polygons, not as run lengths")]
Run = Annotated[
    Path | None,
    typer.Option(help="folder of a round or of a model (default: the distilled model, else the latest round's)"),
]
WithPriors = Annotated[
    bool,
    typer.Option(
        "--with-priors", help="use the latest round's model, with priors from the backend or from stored tables"
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"l2l {import_module(str(__package__)).__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def score_table(metrics: dict[str, float]) -> pd.DataFrame:
    """metrics/evaluate.json -> a row a split and method: mIoU of all, the other scores of the final models."""
    import pandas as pd

    from l2l_core.config import MAX_ROUND

    rows = []
    for split in (key.removeprefix("n_") for key in metrics if key.startswith("n_")):
        rounds = [f"round_{k}" for k in range(MAX_ROUND + 1) if f"{split}_round_{k}_miou" in metrics]
        methods = ["prior", "supervised", *rounds]
        for method in methods:
            name = WARMUP if method == "round_0" else method.replace("_", " ")
            row = {"split": split, "method": name, "mIoU": metrics[f"{split}_{method}_miou"]}
            if method == methods[-1]:
                row |= {title: metrics[f"{split}_{key}"] for key, title in SCORES.items()}
            rows.append(row)
        rows.append({"split": split, "method": f"{name}, no prior", "mIoU": metrics[f"{split}_no_prior_miou"]})
        distilled = {title: metrics.get(f"{split}_distilled_{key}") for key, title in SCORES.items()}
        if distilled["mIoU"] is not None:  # evaluations of earlier versions have none
            rows.append({"split": split, "method": "distilled, no prior", **distilled})
    return pd.DataFrame(rows)


@app.command()
def scores() -> None:
    """Print the scores of the last evaluation."""
    metrics = read_json(METRICS_PATH)
    counts = ", ".join(f"{key.removeprefix('n_')} {count:,}" for key, count in metrics.items() if key.startswith("n_"))
    print(f"{metrics.get('dataset', 'dataset')}, round {metrics.get('evaluated_round')}; sentences: {counts}")
    print(score_table(metrics).to_string(index=False, na_rep="", float_format="%.2f"))
    print("percent; ground truth at original resolution, every sentence counted, probability > 0.5")
    print(f"report: {REPORT_PATH}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Run the pipeline and show its progress.

    Says how many stages are done and about how long the others take. Passes all arguments to `dvc repro` and returns
    its exit code.
    """
    from l2l_core.reporting.run import reproduce

    raise typer.Exit(reproduce(context.args))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="folders of projects, Git revisions or DVC experiments; first, the base"),
    ],
    out: Annotated[Path, typer.Option(help="folder for compare.html")] = REPORT_PATH.parent,
) -> None:
    """Compare two or more experiments on one page.

    Shows parameters that differ, scores side by side, and the same sentences in each experiment.
    """
    from l2l_core.reporting.compare import read_experiment, render_comparison

    page, differences = render_comparison([read_experiment(run) for run in runs])
    with staged_output(out) as folder:
        (folder / "compare.html").write_text(page, encoding="utf-8")
    print("\n".join(differences))
    print(f"comparison: {out / 'compare.html'}")


@app.command()
def predict(
    words: Annotated[
        list[str] | None, typer.Argument(metavar='[IMAGE... "SENTENCE"]', help="images or folders; last, the sentence")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON lines of image and sentence instead")] = None,
    run: Run = None,
    out: Annotated[Path, typer.Option(help="folder for masks, overlays and predictions.jsonl")] = Path("predictions"),
    with_priors: WithPriors = False,
    polygons: Polygons = False,
    batch_size: Annotated[int, typer.Option(min=1, help="maximum batch size; it changes masks only by rounding")] = 32,
) -> None:
    """Segment your own images.

    Writes the mask and an overlay of each pair as PNG, and predictions.jsonl with the masks as run lengths.
    """
    from l2l_core.config import load_params
    from l2l_core.core.device import choose_device
    from l2l_core.core.masks import rle_area_px_all
    from l2l_core.datasets.index import exif_rotation_note
    from l2l_core.inference import predict_files
    from l2l_core.inference.predictor import Predictor
    from l2l_core.model.encoders import TINY

    if pairs and words:
        raise InputError('predict: got both --pairs and arguments, expected IMAGE... "SENTENCE" or --pairs FILE')
    folder = model_folder(run, with_priors=with_priors)
    has_params = Path("params.yaml").is_file()
    device = choose_device(load_params().train.engine.device) if has_params else "auto"
    requested = predict_files.pairs_of_file(pairs) if pairs else predict_files.pairs_of_images(words or [])
    turned = predict_files.exif_rotated_images(requested)
    if turned:
        print(f"note: {exif_rotation_note(turned)}")
    with predict_files.predictions_folder(out) as building:
        predict_files.check_file_names(requested, building)
        predictor = Predictor.from_pretrained(folder, device=device)
        prior_tables = None
        if with_priors:
            params = predict_files.with_trained_proposals(load_params(), predictor.network.known_proposals())
            prior_tables = predict_files.get_priors(requested, params)
        predicted = predict_files.predict_masks(predictor, requested, prior_tables, batch_size)
        trouble = predict_files.write_predictions(requested, predicted, building, polygons=polygons)
    empty = (rle_area_px_all(predicted.rle, predicted.pairs.hw) == 0).sum()
    if trouble:
        raise InputError(f"--out: {out}: {trouble}")
    pairs_said = f"{len(requested)} pair{'s' * (len(requested) != 1)}"
    print(f"{out}: {pairs_said} by {folder}, {predicted.with_prior.sum()} with a prior, {empty} empty masks")
    if predictor.network.params.image_encoder == TINY:
        print("note: this model's encoders are not pretrained; for photographs, train with model.preset=small")


@app.command()
def serve(
    run: Run = None,
    with_priors: WithPriors = False,
    host: Annotated[
        str, typer.Option(help="address to listen at; any other address exposes the page to other machines")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 7860,
    max_mb: Annotated[int, typer.Option(min=1, help="largest upload")] = 10,
) -> None:
    """Open a demo page in the browser.

    Shows the mask of an uploaded image and a sentence, with priors also the prior and the proposal. Needs the extra
    `serve`.
    """
    from l2l_core.config import load_params
    from l2l_core.inference.serve import DemoSession, open_page, require_gradio

    require_gradio()
    folder, params = model_folder(run, with_priors=with_priors), load_params()
    open_page(lambda: DemoSession.of(folder, params, max_mb, with_priors=with_priors), host, port)


@export_app.command("coco")
def export_coco(
    round_number: Round = None,
    out: Annotated[Path, typer.Option(help="folder")] = Path("export"),
    polygons: Polygons = False,
) -> None:
    """Write the accepted pseudo-labels as COCO and JSON lines.

    The COCO file is for other tools. The JSON lines are a dataset for this project.
    """
    from l2l_core.export import labels

    round_number = latest_round("pseudo_labels.parquet") if round_number is None else round_number
    found = labels.read_labels(round_number)
    chosen = labels.accepted_labels(found)
    name = f"pseudo_labels_round_{round_number}"
    with staged_output(out) as folder:
        coco = labels.to_coco(chosen, polygons=polygons)
        (folder / f"{name}.json").write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
        lines = labels.to_json_lines(chosen, out, polygons=polygons)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(chosen)} of {len(found)} pseudo-labels of round {round_number}: {out / name}.json, {out / name}.jsonl")


@export_app.command("label-studio")
def export_label_studio(
    round_number: Round = None,
    out: Annotated[Path, typer.Option(help="folder")] = Path("export"),
    limit: Annotated[int, typer.Option(min=1, help="sentences at most")] = 200,
    image_prefix: Annotated[str, typer.Option(help="URL prefix of image paths")] = "/data/local-files/?d=",
    polygons: Polygons = False,
) -> None:
    """Write the pseudo-labels to review first, for Label Studio.

    Orders tasks by the expected benefit of a review. Each task contains its pseudo-label as a prediction.
    """
    from l2l_core.export import labels, review

    round_number = latest_round("pseudo_labels.parquet") if round_number is None else round_number
    tasks = review.label_studio_tasks(labels.read_labels(round_number), limit, image_prefix, polygons=polygons)
    name = f"review_round_{round_number}"
    with staged_output(out) as folder:
        (folder / f"{name}.json").write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
        (folder / f"{name}.xml").write_text(review.labeling_interface(polygons=polygons), encoding="utf-8")
    print(f"{len(tasks)} tasks, most useful first: {out / name}.json; labeling interface: {out / name}.xml")


@export_app.command("onnx")
def export_onnx(
    run: Run = None,
    with_priors: Annotated[
        bool, typer.Option("--with-priors", help="the latest round's model, which takes priors")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder for model.onnx")] = Path("export"),
) -> None:
    """Write the network as ONNX.

    Needs the extra `export`. The model folder itself holds safetensors and everything needed to load them.
    """
    from l2l_core.export.onnx import write_onnx
    from l2l_core.model.segmenter import Segmenter

    folder = model_folder(run, with_priors=with_priors)
    with staged_output(out) as building:
        write_onnx(Segmenter.load(folder), building / "model.onnx")
    print(f"{folder}: {out / 'model.onnx'}; tokenizer: {folder / 'tokenizer'}")


@app.command()
def check(
    override: Annotated[
        list[str] | None,
        typer.Option("-S", "--set-param", metavar="KEY=VALUE", help="parameter, as in `dvc exp run -S`"),
    ] = None,
    timing: Annotated[bool, typer.Option(help="measure times with a few training steps and predictions")] = True,
) -> None:
    """Check data and parameters before a run.

    Checks parameters, data, label budget, priors, encoders, device, and disk. Then estimates time, memory and output
    size of each stage. Leaves no files.
    """
    from l2l_core.config import load_params
    from l2l_core.preflight.checks import run_checks

    run_checks(load_params(overrides=override or []), timing=timing, print_line=lambda line: print(line, flush=True))


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="move torn files aside, so that dvc repro goes on")] = False,
) -> None:
    """Find torn files and, with --fix, move them aside.

    A kill or a failing disk leaves such files. Checks DVC's own files, every artifact and its copy in DVC's cache
    against dvc.lock, and .scratch.
    """
    from l2l_core.preflight.doctor import run_doctor

    print("\n".join(run_doctor(fix=fix)))


@app.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="refcoco | refcoco+ | refcocog | images (photos of all three)"),
    ],
) -> None:
    """Download published datasets.

    Each goes to data/NAME, which DVC then tracks. Existing files are checked and kept. A broken download continues.
    """
    from l2l_core.config import load_params
    from l2l_core.datasets.download import RECORD, fetch, track
    from l2l_core.datasets.published import ARCHIVES

    unknown = [name for name in names if name not in ARCHIVES]
    if unknown:
        raise InputError(f"fetch: got {unknown[0]!r}, expected some of {', '.join(ARCHIVES)}")
    params, scratch = load_params().fetch, Path(".scratch") / "fetch"
    for name in names:
        target = Path("data") / name
        done = fetch(ARCHIVES[name], target, scratch, params.mirror, params.sha256.get(ARCHIVES[name].name))
        print(f"fetch: {done}", flush=True)
        if (target / RECORD).is_file():
            track(target)


importers = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(importers, name="import", help="Convert annotations of other tools to pairs.")

ImageFolder = Annotated[Path, typer.Option("--images", file_okay=False, help="folder of the images")]
PairsFolder = Annotated[Path, typer.Option("--out", help="folder for pairs.jsonl; images stay where they are")]
SkipUnknown = Annotated[bool, typer.Option("--skip-unknown", help="leave out shapes that have no mask, and count them")]


@importers.command("coco")
def import_coco(
    instances: Annotated[Path, typer.Argument(metavar="INSTANCES.json", help="images and annotations")],
    images: ImageFolder,
    out: PairsFolder,
    sentences: Annotated[
        Path | None, typer.Argument(metavar="SENTENCES.json|.jsonl", help="sentences about the annotations")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate-sentences", help="instead of SENTENCES, up to three an object, in English")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="of --generate-sentences")] = 0,
) -> None:
    """Convert COCO annotations and a file of sentences, or generate the sentences.

    Generated sentences use kinds, places, sizes, order and neighbors, in the styles of RefCOCO, RefCOCO+ and RefCOCOg.
    Each is checked against all annotated objects of its image.
    """
    from l2l_core.datasets.importers import coco, coco_generated

    if generate == (sentences is not None):
        raise InputError("import coco: expected either a file SENTENCES or --generate-sentences")
    if sentences is None:
        _write_pairs(coco_generated.generate_sentences(instances, images, out, seed), out)
    else:
        _write_pairs(coco.import_coco(instances, sentences, images, out), out)


@importers.command("label-studio")
def import_label_studio(
    export: Annotated[Path, typer.Argument(metavar="EXPORT.json", help="tasks, exported as JSON")],
    images: ImageFolder,
    out: PairsFolder,
    skip_unknown: SkipUnknown = False,
) -> None:
    """Convert Label Studio's JSON export, such as that of reviewed tasks of `l2l export label-studio`."""
    from l2l_core.datasets.importers import label_studio

    _write_pairs(label_studio.import_label_studio(export, images, out, skip_unknown=skip_unknown), out)


@importers.command("labelme")
def import_labelme(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of LabelMe's JSON files")],
    out: PairsFolder,
    skip_unknown: SkipUnknown = False,
) -> None:
    """Convert JSON files of LabelMe, X-AnyLabeling or ReasonSeg beside their images."""
    from l2l_core.datasets.importers import labelme

    _write_pairs(labelme.import_labelme(folder, out, skip_unknown=skip_unknown), out)


def _write_pairs(imported: Imported, out: Path) -> None:
    from l2l_core.datasets.importers.entries import FILE_NAME

    if (out / FILE_NAME).exists():
        raise InputError(
            f"--out: {out / FILE_NAME} exists and may hold your own changes; name another folder or remove it"
        )
    with staged_output(out) as folder:
        for name, photo in imported.photos.items():
            (folder / name).write_bytes(photo)
        (folder / FILE_NAME).write_text(imported.lines, encoding="utf-8")
    for warning in imported.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rows = [json.loads(line) for line in imported.lines.splitlines()]
    masks = sum("mask" in row for row in rows)
    photos = f", {len(imported.photos)} photos out of the files themselves" if imported.photos else ""
    print(f"{len(rows)} pairs, {masks} of them with a mask{photos}: {out / FILE_NAME}")
    styles = Counter(row["style"] for row in rows if "style" in row)
    if styles:
        print("styles: " + ", ".join(f"{style} {count}" for style, count in sorted(styles.items())))
    changes = f"-S dataset={out} -S priors.backend=none -S split.labeled_fraction=1.0"
    print(f"next (or with another priors.backend): l2l check {changes}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def stage(context: typer.Context, name: Annotated[str, typer.Argument(help="such as warmup or select")]) -> None:
    """Run one stage of the pipeline without DVC, in a checkout.

    Passes further arguments to the stage, such as `l2l stage select --round 1`.
    """
    names = sorted(path.stem for path in Path("stages").glob("[!_]*.py"))
    if name not in names:
        expected = f"one of {', '.join(names)}" if names else "a folder stages/: run this in a checkout of the project"
        raise InputError(f"stage: got {name!r}, expected {expected}")
    command = [sys.executable, "-m", f"stages.{name}", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _alias(old: str, new: str, command: Callable[..., None]) -> None:
    """Keep an old spelling working: hidden from the help, and it names the new one."""

    @wraps(command)
    def renamed(*args: object, **kwargs: object) -> None:
        print(f"note: {old} is called `l2l {new}` now", file=sys.stderr)
        command(*args, **kwargs)

    app.command(old, hidden=True)(renamed)


_alias("show", "scores", scores)
_alias("export-coco", "export coco", export_coco)
_alias("export-review", "export label-studio", export_label_studio)
_alias("export-model", "export onnx", export_onnx)


def run_command() -> None:
    """Parse the command line and run the command. Raises SystemExit, or L2LError where the input is bad."""
    app(prog_name="l2l")


def main() -> int:
    """The command `l2l`; returns the exit code."""
    end_on_sigterm()
    return exit_code(run_command)
