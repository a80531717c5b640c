"""The tables that flow between stages: their columns, and how to read and write them.

Only this file defines column names and types. Boxes are x1 y1 x2 y2 in original-image pixels, end-exclusive.
Masks are COCO compressed run lengths at the image's own height and width unless noted otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from l2l_core.errors import DOCTOR, ArtifactError, writing

if TYPE_CHECKING:  # some stages, and `--help`, do not need it
    import pandas as pd

    from l2l_core.config import ProposalsParams

TRAIN = "train"
EVAL_SPLITS = ("val", "test", "testA", "testB")
ROLES = ("labeled", "unlabeled", "eval")
PRIOR_STATUSES = ("ok", "empty", "invalid", "error")
PRIOR_KINDS = ("mask", "box", "point", "none")  # what a prior is rendered from; a mask comes before a box

SHOWN_SENT_IDS = 5
"""Maximum number of sentences listed in an error; the rest is only counted."""

PART_ROWS = 2048
"""Most rows of a part of a table that is read in parts: 30 MB of the largest soft maps in use."""
BUFFER_BYTES = 1 << 20

_BOX = pa.list_(pa.float32(), 4)
_POINT = pa.list_(pa.float32(), 2)

IMAGES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),  # relative to the project root, with forward slashes
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("sha256", pa.string()),
    ]
)
REFS = pa.schema(
    [
        ("sent_id", pa.int64()),  # one row per sentence, unique
        ("ref_id", pa.int64()),
        ("ann_id", pa.int64()),  # -1: an unlabeled pair of user data, without a mask
        ("image_id", pa.int64()),
        ("category", pa.string()),
        ("sentence", pa.string()),
        ("style", pa.string()),  # kind of sentence if the source names one, else ""
        ("split", pa.string()),  # train, val, test, testA, testB
        ("bbox", _BOX),  # the true box; null if the source has none
    ]
)
OBJECTS = pa.schema(  # every annotated object in the images, referred to or not
    [("ann_id", pa.int64()), ("image_id", pa.int64()), ("category", pa.string()), ("bbox", _BOX)]
)
MASKS = pa.schema(  # one row per referred object
    [
        ("ann_id", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("rle_counts", pa.binary()),
        ("area_px", pa.int64()),
    ]
)
SPLIT = pa.schema([("sent_id", pa.int64()), ("role", pa.string())])
RESPONSES = pa.schema(  # one row per sentence and sample: the unparsed response of the multimodal LLM
    [
        ("sent_id", pa.int64()),
        ("sample_index", pa.int16()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("prompt_sha256", pa.string()),
        ("raw_text", pa.string()),
        ("mask", pa.binary()),  # run lengths of a response that is a mask; null: only text
        ("failure", pa.string()),  # empty or error if there is no text; else null
        ("reason", pa.string()),  # of an error
        ("attempts", pa.int16()),
        ("coord_space", pa.string()),
        ("height", pa.int32()),  # original image
        ("width", pa.int32()),
        ("input_height", pa.int32()),  # image as given to the model
        ("input_width", pa.int32()),
        ("prompt_tokens", pa.int32()),  # of all attempts
        ("completion_tokens", pa.int32()),
        ("precision", pa.string()),  # bf16 or fp32 of the model's computation; null if unknown
    ]
)
PRIORS = pa.schema(
    [
        ("sent_id", pa.int64()),
        ("sample_index", pa.int16()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("prompt_sha256", pa.string()),
        ("raw_text", pa.string()),  # kept so that a new parser need not query the model
        ("status", pa.string()),
        ("target", pa.string()),
        ("attributes", pa.list_(pa.string())),
        ("relation", pa.string()),
        ("bbox", _BOX),
        ("point", _POINT),
        ("mask", pa.binary()),  # a row with a mask has the mask's bounding box as bbox, and no point
        ("score", pa.float32()),
        ("coord_space", pa.string()),
        ("input_height", pa.int32()),
        ("input_width", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)
PROPOSALS = pa.schema(
    [
        ("sent_id", pa.int64()),
        ("height", pa.int16()),
        ("width", pa.int16()),
        ("soft", pa.binary()),  # height * width bytes, row-major, 0..255 is probability 0..1 over the whole image
        ("score", pa.float32()),  # 0 without a prior
        ("predicted_iou", pa.float32()),  # the renderer's own estimate of the mask's IoU; null if it has none
    ]
)
PSEUDO_LABELS = pa.schema(  # one row per unlabeled sentence and round; masks at the image's own size
    [
        ("round", pa.int16()),
        ("sent_id", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("rle_counts", pa.binary()),  # the pseudo-label
        ("candidate", pa.string()),  # how it was built
        ("keep_rle", pa.binary()),  # its valid pixels
        ("weight", pa.binary()),  # of pixels: proposals.size_px**2 bytes, row-major, 0..255 is weight 0..1; null: all 1
        ("accept_prob", pa.float32()),
        ("reward", pa.float32()),
        ("prior_iou", pa.float32()),
        ("confidence", pa.float32()),
        ("accepted", pa.bool_()),
        ("method", pa.string()),
    ]
)
PREDICTIONS = pa.schema(  # one row per evaluated sentence, model and prior setting
    [
        ("model", pa.string()),  # "supervised", "round_<k>" or "distilled"
        ("with_prior", pa.bool_()),
        ("sent_id", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("rle_counts", pa.binary()),
    ]
)
PER_SENTENCE = pa.schema(
    [
        ("method", pa.string()),  # "prior", "supervised", "round_<k>", "round_<k>_no_prior", "distilled"
        ("sent_id", pa.int64()),
        ("split", pa.string()),
        ("style", pa.string()),
        ("intersection_px", pa.int64()),
        ("union_px", pa.int64()),
        ("pred_area_px", pa.int64()),
        ("gt_area_px", pa.int64()),
        ("iou", pa.float32()),
    ]
)


@dataclass(frozen=True)
class IndexPaths:
    """Paths of the tables that ingest writes."""

    images: Path = Path("data/index/images.parquet")
    refs: Path = Path("data/index/refs.parquet")
    objects: Path = Path("data/index/objects.parquet")
    masks: Path = Path("data/index/masks.parquet")


INDEX = IndexPaths()
ROUND_PATH = Path("data/round.txt")
METRICS_PATH = Path("metrics/evaluate.json")
REPORT_PATH = Path("report/index.html")
SPLIT_PATH = Path("data/split/split.parquet")
LABELED_MASKS_PATH = Path("data/split/labeled_masks.parquet")
RESPONSES_PATH = Path("data/priors/responses.parquet")
PRIORS_METRICS_PATH = Path("metrics/priors.json")
PRIORS_PATH = Path("data/priors/priors.parquet")
PROPOSALS_METRICS_PATH = Path("metrics/proposals.json")
PROPOSALS_PATH = Path("data/proposals/proposals.parquet")
RENDERING_PATH = Path("data/proposals/rendering.json")
SUPERVISED_FOLDER = Path("data/supervised")
DISTILLED_FOLDER = Path("data/distilled")
"""Outputs of the student for use without priors: model/, curves/, history/."""
PER_SENTENCE_PATH = Path("data/evaluation/per_sentence.parquet")


def round_folder(round_number: int) -> Path:
    """Folder of all outputs of a round: model/, curves/, folds/, pseudo_labels.parquet, history/."""
    return Path(f"data/rounds/{round_number}")


def read_rendering() -> ProposalsParams:
    """Rendering parameters of the proposals, with fitted values. Raises ArtifactError if the file is missing or bad."""
    from l2l_core.config import ProposalsParams  # it loads pydantic, which `--help` does not need

    try:
        return ProposalsParams.model_validate(json.loads(RENDERING_PATH.read_bytes())["proposals"])
    except FileNotFoundError:
        raise ArtifactError(f"{RENDERING_PATH}: not found, run the stage that writes it: dvc repro") from None
    except (ValueError, TypeError, KeyError):
        raise ArtifactError(f"{RENDERING_PATH}: not a file of this project; {DOCTOR}") from None


def write_metrics(metrics: Mapping[str, object], path: Path) -> None:
    """Write metrics where DVC reads them, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read an artifact that holds a JSON object, such as metrics. Raises ArtifactError if it is missing or torn."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not found, run the stage that writes it: dvc repro") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: not a file of this project; {DOCTOR}")
    return found


def make_table(rows: Iterable[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Row dicts -> a table with exactly the schema's columns (a missing key is null)."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def write_table(table: pa.Table, path: str | Path, schema: pa.Schema) -> None:
    """Write a table atomically with zstd compression and checksums; identical rows give identical bytes.

    Raises ArtifactError if the columns are not the schema's.
    """
    path = Path(path)
    if not table.schema.equals(schema):
        raise ArtifactError(f"{path}: columns differ from the schema: {table.schema} against {schema}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: str | Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns.

    Raises ArtifactError if the file is missing, torn, not Parquet, or lacks a column of the schema.
    """
    path, wanted = Path(path), _wanted(schema, columns)
    with _reading(path):
        table = pq.read_table(path, columns=list(wanted.names), partitioning=None, page_checksum_verification=True)
    return _checked(table, path, wanted)


@dataclass(frozen=True)
class TableParts:
    """A table in a file, or some of its columns, as parts of consecutive rows; each iteration reads the file anew.

    Memory holds one part of at most PART_ROWS rows, however large the table is. Raises ArtifactError as `read_table`.
    """

    path: Path
    schema: pa.Schema
    columns: Sequence[str] | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        wanted = _wanted(self.schema, self.columns)
        # A buffer: without one, the file's whole columns are read before the first part.
        with (
            _reading(self.path),
            pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, page_checksum_verification=True) as file,
        ):
            found = [name for name in wanted.names if name in file.schema_arrow.names]
            _checked(file.schema_arrow.empty_table().select(found), self.path, wanted)
            rows = 0
            for part in file.iter_batches(PART_ROWS, columns=found):
                rows += len(part)
                yield pa.Table.from_batches([part]).select(found).replace_schema_metadata(None)
            if rows != file.metadata.num_rows:  # PyArrow itself ends early, without an error
                raise ValueError(f"{rows} rows, expected {file.metadata.num_rows}")


def parts_of(table: pa.Table | TableParts) -> Iterator[pa.Table]:
    """A table in parts of at most PART_ROWS rows, in its order."""
    if isinstance(table, TableParts):
        yield from table
    else:
        yield from (table.slice(first, PART_ROWS) for first in range(0, len(table), PART_ROWS))


def _wanted(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a Parquet file into an ArtifactError."""
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not found, run the stage that writes it: dvc repro") from None
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{path}: not a Parquet file of this project: {reason}; {DOCTOR}") from None


def _checked(table: pa.Table, path: Path, wanted: pa.Schema) -> pa.Table:
    """The table without metadata. Raises ArtifactError unless it has the wanted columns."""
    if not table.schema.remove_metadata().equals(wanted):
        raise ArtifactError(f"{path}: columns {table.schema.names}, expected {wanted.names} with their types")
    return table.replace_schema_metadata(None)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """A table as a DataFrame; integer columns stay integers, lists become numpy arrays, nulls become None."""
    return table.to_pandas()


def refuse_sentences(sent_ids: pd.Index[int] | pd.Series[int], problem: str) -> None:
    """Raise ArtifactError that names the problem and the first of the sentences that have it; none: do nothing."""
    shown = [str(sent_id) for sent_id in sent_ids[:SHOWN_SENT_IDS]]
    more = f" and {len(sent_ids) - len(shown)} more" if len(sent_ids) > len(shown) else ""
    if shown:
        raise ArtifactError(f"{problem} sent_id {', '.join(shown)}{more}; run dvc repro")


SENTENCE_COLUMNS = ("sent_id", "ref_id", "image_id", "sentence", "style", "split")
"""Columns of REFS that do not reveal the ground truth; training reads only these."""
