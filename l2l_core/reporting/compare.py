"""Two or more experiments on one page: changed parameters, scores, and a paired comparison on the same sentences."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pandas as pd

from l2l_core.artifacts import records
from l2l_core.config import read_yaml
from l2l_core.core.metrics import POSITIVE_IOU, iou_from_px, segmentation_scores
from l2l_core.errors import ArtifactError, ConfigError, InputError, redacted
from l2l_core.evaluation.error_analysis import CHANGED_IOU, RESAMPLES, changes, mean_interval
from l2l_core.evaluation.evaluate import DISTILLED, PRIOR, SUPERVISED
from l2l_core.reporting.html import DIFFERENCE, PERCENT, SCORE_NAMES, Table, render_page

if TYPE_CHECKING:
    from dvc.api import DVCFileSystem

PARAMS_PATH = Path("params.yaml")

NEEDED = (PARAMS_PATH, records.METRICS_PATH, records.PER_SENTENCE_PATH, records.INDEX.refs)
"""Files read from an experiment: small, and in Git or DVC's cache for every version."""

LETTERS = string.ascii_uppercase
"""Short names of the experiments in the tables: full names are too wide for a phone."""

SEED = 0
"""Bootstrap seed: the same experiments give the same page."""

CHANGE_NAMES = {
    "better": "better",
    "worse": "worse",
    "reached": f"reached IoU {POSITIVE_IOU}",
    "lost": f"fell below {POSITIVE_IOU}",
}
"""Keys of `error_analysis.changes` shown as shares of the sentences."""


@dataclass(frozen=True)
class Experiment:
    """Data of one experiment shown on a page."""

    name: str
    params: Mapping[str, object]  # flat: "section.key" -> value
    version: str | None  # of the dataset, if it has one
    last_round: int
    per_sentence: pd.DataFrame  # records.PER_SENTENCE with image_id and sentence; sorted by method and sent_id

    @property
    def final(self) -> pd.DataFrame:
        """Rows of the evaluated model with priors, by sent_id."""
        return self.per_sentence[self.per_sentence["method"] == f"round_{self.last_round}"].set_index("sent_id")

    @property
    def data_set(self) -> str:
        """Name and version of the dataset, for display."""
        name = Path(str(self.params.get("dataset"))).name
        return name if self.version is None else f"{name}, version {self.version}"


def read_experiment(name: str) -> Experiment:
    """name: folder of a project, or a Git revision or DVC experiment of the project in the current folder.

    Raises InputError if it is none of these, or its evaluation is missing or of another version.
    """
    with _files_of(name) as folder:
        missing = [path.as_posix() for path in NEEDED if not (folder / path).is_file()]
        if missing:
            raise InputError(
                f"compare: {name}: {missing[0]} not found; run its pipeline (dvc repro) and, of a Git revision, "
                "commit params.yaml, *.lock and metrics; or fetch what was left elsewhere (dvc pull)"
            )
        try:
            table = records.read_table(folder / records.PER_SENTENCE_PATH, records.PER_SENTENCE)
            refs = records.read_table(folder / records.INDEX.refs, records.REFS, ["sent_id", "image_id", "sentence"])
            metrics, params = records.read_json(folder / records.METRICS_PATH), read_yaml(folder / PARAMS_PATH)
        except (ArtifactError, ConfigError) as error:
            raise InputError(f"compare: {name}: {str(error).replace(f'{folder}/', '')}") from None
    per_sentence = records.to_frame(table).merge(records.to_frame(refs), on="sent_id")
    last_round, version = int(metrics["evaluated_round"]), metrics.get("dataset_version")
    if f"round_{last_round}" not in set(per_sentence["method"]):
        raise InputError(
            f"compare: {name}: {records.PER_SENTENCE_PATH} has no row of round {last_round}, which "
            f"{records.METRICS_PATH} is about; run dvc repro there"
        )
    ordered = per_sentence.sort_values(["method", "sent_id"], kind="stable", ignore_index=True)
    shown = "workspace" if name == "." else name
    return Experiment(shown, _flat(params), None if version is None else str(version), last_round, ordered)


def render_comparison(experiments: Sequence[Experiment]) -> tuple[str, list[str]]:
    """The whole page, and one line per experiment except the first, which is the baseline.

    Raises InputError if there are fewer than two, or they were not evaluated on the same sentences.
    """
    if not 2 <= len(experiments) <= len(LETTERS):
        raise InputError(f"compare: got {len(experiments)} run(s), expected 2 to {len(LETTERS)} to compare")
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise InputError(f"compare: got {', '.join(names)}, expected each run once")
    first = experiments[0]
    for other in experiments[1:]:
        _require_same_sentences(first, other)
    paired = _paired_tables(experiments)
    page = render_page(
        "compare.html.jinja",
        data_set=first.data_set,
        experiments=[
            (letter, f"{one.name}, round {one.last_round}") for letter, one in zip(LETTERS, experiments, strict=False)
        ],
        names=names,
        params=_different_params(experiments),
        scores=_score_tables(experiments),
        paired=paired,
        styles=_style_tables(experiments),
        changed_iou=CHANGED_IOU,
        resamples=RESAMPLES,
    )
    return page, _differences(experiments, paired)


def _differences(experiments: Sequence[Experiment], paired: Sequence[Table]) -> list[str]:
    """One line per experiment except the first: the difference of its mIoU to the first one's, by split.

    Another line each for the distilled models, where all experiments have one.
    """
    said: dict[str, list[str]] = {other.name: [] for other in experiments[1:]}
    for split, table in zip(_splits(experiments), paired, strict=True):
        for name, (_, (mean, low, high, *_)) in zip(said, table.rows, strict=True):
            said[name].append(f"{split} {mean:+.2f} ({low:+.2f} to {high:+.2f})")
    first = experiments[0].name
    lines = [f"mIoU of {name} - {first}, 95 % interval: {', '.join(splits)}" for name, splits in said.items()]
    if _have_distilled(experiments):
        before = _distilled_miou(experiments[0])
        for other in experiments[1:]:
            shown = ", ".join(f"{split} {miou - before[split]:+.2f}" for split, miou in _distilled_miou(other).items())
            lines.append(f"mIoU of {other.name} - {first}, distilled models without priors: {shown}")
    return lines


def _have_distilled(experiments: Sequence[Experiment]) -> bool:
    """Runs of earlier versions have no distilled model."""
    return all(one.per_sentence["method"].eq(DISTILLED).any() for one in experiments)


def _distilled_miou(experiment: Experiment) -> dict[str, float]:
    """Split -> mIoU of the distilled model, in percent."""
    rows = experiment.per_sentence[experiment.per_sentence["method"] == DISTILLED]
    parts = ((split, rows[rows["split"] == split]) for split in _splits([experiment]))
    return {split: segmentation_scores(one["intersection_px"], one["union_px"])["miou"] for split, one in parts}


@contextmanager
def _files_of(name: str) -> Iterator[Path]:
    """A folder with the files of NEEDED that the experiment has."""
    if os.path.isdir(name):  # Path.is_dir raises for impossible names
        yield Path(name)
        return
    # Imported here: DVC takes a second to import, and a comparison of folders does not need it.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    with TemporaryDirectory() as folder:
        files = DVCFileSystem(rev=name, subrepos=True)  # a project in a subfolder is a subrepo of the revision
        for path in NEEDED:
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                files.get_file((Path("/") / _below_git_root(files) / path).as_posix(), str(target))
            except FileNotFoundError:  # not in Git, or not in DVC's cache
                target.unlink(missing_ok=True)
            except DvcException:
                raise InputError(
                    f"compare: got {name!r}, expected a project's folder, or a Git revision or DVC experiment of the "
                    "project in this folder (`dvc exp show` lists them)"
                ) from None
        yield Path(folder)


def _below_git_root(files: DVCFileSystem) -> Path:
    """Path of the current folder's project within its Git repository: `.` if it is the root."""
    return Path.cwd().resolve().relative_to(Path(files.repo.scm.root_dir).resolve())


def _flat(section: object, prefix: str = "") -> dict[str, object]:
    """Nested sections as "section.key" -> value."""
    flat: dict[str, object] = {}
    for key, value in section.items() if isinstance(section, dict) else ():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = redacted(value) if isinstance(value, str) else value
    return flat


def _require_same_sentences(first: Experiment, other: Experiment) -> None:
    """Raise InputError if score differences could come from different data."""
    both = f"compare: {first.name} and {other.name}:"
    if first.data_set != other.data_set:
        raise InputError(f"{both} different datasets, {first.data_set} and {other.data_set}; scores do not compare")
    ours, theirs = first.final, other.final
    alone = ours.index.symmetric_difference(theirs.index)
    if len(alone):
        shown = f"sent_id {alone[0]}" + (f" and {len(alone) - 1} more" if len(alone) > 1 else "")
        raise InputError(f"{both} different sentences, {shown} evaluated in one alone; use the same evaluate.splits")
    for column, what in (("sentence", "sentences"), ("split", "splits"), ("gt_area_px", "true masks")):
        differs = ours.index[(ours[column] != theirs[column].loc[ours.index]).to_numpy()]
        if len(differs):
            raise InputError(f"{both} different {what}, first at sent_id {differs[0]}; scores do not compare")


def _different_params(experiments: Sequence[Experiment]) -> list[tuple[str, list[str]]]:
    """Parameters that differ, with each experiment's value as YAML writes it; "not there" if it has none."""
    keys = dict.fromkeys(key for experiment in experiments for key in experiment.params)
    absent = object()
    rows = []
    for key in keys:
        values = [experiment.params.get(key, absent) for experiment in experiments]
        if any(value != values[0] for value in values):
            rows.append((key, ["not there" if value is absent else _said(value) for value in values]))
    return rows


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # numbers, null and lists look alike in YAML and JSON


def _beside(title: str, rows: Mapping[str, Sequence[float]]) -> Table:
    """rows: name -> one number per experiment. One column per experiment; all but the first add their difference."""
    columns = {LETTERS[0]: PERCENT}
    for letter in LETTERS[1 : len(next(iter(rows.values())))]:
        columns |= {letter: PERCENT, _difference(letter): DIFFERENCE}
    cells: list[tuple[str, list[float | None]]] = []
    for name, values in rows.items():
        cells.append((name, [values[0], *(cell for value in values[1:] for cell in (value, value - values[0]))]))
    return Table(title, columns, cells)


def _difference(letter: str) -> str:
    return f"{letter} − {LETTERS[0]}"


def _splits(experiments: Sequence[Experiment]) -> list[str]:
    found = set(experiments[0].per_sentence["split"])
    return [split for split in (records.TRAIN, *records.EVAL_SPLITS) if split in found]


def _score_tables(experiments: Sequence[Experiment]) -> list[Table]:
    tables = []
    all_distilled = _have_distilled(experiments)
    for split in _splits(experiments):
        rows: dict[str, list[float]] = {}
        for one in experiments:
            final = f"round_{one.last_round}"
            shown = {final: SCORE_NAMES} | {
                method: {"miou": f"mIoU, {said}"}
                for method, said in (
                    (f"{final}_no_prior", "without prior"),
                    *([(DISTILLED, "distilled, no prior")] if all_distilled else []),
                    (SUPERVISED, "supervised only"),
                    (PRIOR, "prior only"),
                )
            }
            for method, names in shown.items():
                of_method = one.per_sentence["split"].eq(split) & one.per_sentence["method"].eq(method)
                scored = one.per_sentence[of_method]
                scores = segmentation_scores(scored["intersection_px"], scored["union_px"])
                for key, name in names.items():
                    rows.setdefault(name, []).append(scores[key])
        tables.append(_beside(f"{split}: {len(scored):,} sentences", rows))
    return tables


def _paired_tables(experiments: Sequence[Experiment]) -> list[Table]:
    """How each experiment's predictions differ from the first one's on the same sentences, one table per split."""
    first, *others = experiments
    columns = {"mIoU": DIFFERENCE, "95 % from": DIFFERENCE, "to": DIFFERENCE}
    columns |= dict.fromkeys(CHANGE_NAMES.values(), PERCENT)
    tables = []
    for split in _splits(experiments):
        rows: list[tuple[str, list[float | None]]] = []
        for letter, other in zip(LETTERS[1:], others, strict=False):
            before, after = (one.final[one.final["split"] == split] for one in (first, other))
            change = changes(before, after)
            ious = [iou_from_px(final["intersection_px"], final["union_px"]) for final in (before, after)]
            low, high = mean_interval(100 * (ious[1] - ious[0]), before["image_id"].to_numpy(), SEED)
            shares: list[float | None] = [100 * change[key] / len(before) for key in CHANGE_NAMES]
            rows.append((_difference(letter), [change["mean"], low, high, *shares]))
        tables.append(Table(f"{split}, sentence by sentence", columns, rows))
    return tables


def _style_tables(experiments: Sequence[Experiment]) -> list[Table]:
    """mIoU by sentence style, if the dataset has at least two styles."""
    tables = []
    for split in _splits(experiments):
        finals = [one.final[one.final["split"] == split] for one in experiments]
        counts = finals[0]["style"].value_counts().sort_index()
        if len(counts) < 2:
            continue
        miou = [100 * final.groupby("style")["iou"].mean() for final in finals]
        rows = {f"{style or 'unnamed'} ({count:,})": [one[style] for one in miou] for style, count in counts.items()}
        tables.append(_beside(f"{split}, mIoU by kind of sentence", rows))
    return tables
