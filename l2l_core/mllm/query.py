"""Build a prior backend and query it about every sentence, in chunks that survive a kill."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import assert_never

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from l2l_core.artifacts import records
from l2l_core.artifacts.chunks import read_chunk
from l2l_core.config import LIVE_BACKENDS, ONE_PROCESS, ClusterParams, PriorsParams
from l2l_core.core.files import files_state, folder_state
from l2l_core.core.memory import available_bytes
from l2l_core.core.progress import LOG_INTERVAL_S, logger
from l2l_core.core.threads import limited_threads, thread_count
from l2l_core.errors import ConfigError, InputError
from l2l_core.mllm.backend import PriorBackend, Question, RawResponse, clean_text
from l2l_core.mllm.coords import COORD_SPACES, resolve_coord_space
from l2l_core.mllm.detector import Detector, DetectorBackend
from l2l_core.mllm.engine import Engine, MllmBackend
from l2l_core.mllm.image_backend import ImageBackend
from l2l_core.mllm.prompt import prompt_sha256
from l2l_core.mllm.replay import ReplayBackend, load_recorded, mask_files
from l2l_core.mllm.simulated import SimulatedBackend, make_truth, preset_coord_space
from l2l_core.workers.chunks import executor_of, name_units
from l2l_core.workers.executor import Compute, Job, Task, Workers

MIN_CHUNK_TO_STOP = 8
"""If all requests of a chunk of at least this size fail, the engine is assumed to be broken, and the stage stops."""

SMALL_BYTES = 1 << 28
"""Size of a model folder: below it, a copy in each process needs little memory."""
WORKER_BYTES = 1 << 30
"""Memory of a process with a small model, rounded up: Python, PyTorch, and the images of this and the next chunk."""

COMPUTING_BACKENDS = ("transformers", "vllm", "detector")
"""They run the model in their own process, and use `tensor_parallel` GPUs if there are any."""
VALID = pa.field("is_valid", pa.bool_())
"""A column of a queried chunk that is not stored: whether the response follows the prompt."""

MakeBackend = Callable[[], PriorBackend]


def make_backend(params: PriorsParams, index: records.IndexPaths) -> PriorBackend:
    """The backend that `priors.backend` names. Only `simulated` reads true boxes.

    Raises InputError or ConfigError if the data, the parameters or the installed packages do not fit it.
    """
    match params.backend:
        case "simulated":
            columns = ["sent_id", "image_id", "ann_id", "category", "bbox"]
            refs = records.to_frame(records.read_table(index.refs, records.REFS, columns))
            objects = records.to_frame(records.read_table(index.objects, records.OBJECTS))
            space = preset_coord_space(params.preset, params.coord_space)
            return SimulatedBackend(params.preset, space, params.seed, make_truth(refs, objects))
        case "replay":
            refs = records.to_frame(records.read_table(index.refs, records.REFS, records.SENTENCE_COLUMNS))
            sizes = records.to_frame(records.read_table(index.images, records.IMAGES, ["image_id", "height", "width"]))
            return ReplayBackend(load_recorded(str(params.replay_file), refs, sizes, params.coord_space))
        case "none":
            return ReplayBackend({}, "none")
        case "transformers" | "openai" | "vllm":
            model = Path(str(params.model))
            if params.uses_builtin_mllm and params.backend != "openai" and not model.is_dir():
                raise ConfigError(
                    f"params.yaml: priors.model: no folder {str(model)!r} here, expected the model that comes with the "
                    "project; run from the project's root"
                )
            resolve_coord_space(str(params.model), params.coord_space)  # fail before loading a model for minutes
            return MllmBackend(_make_engine(params), params)
        case "detector":
            return DetectorBackend(_make_detector(params), params)
        case _:
            assert_never(params.backend)


def _make_engine(params: PriorsParams) -> Engine:
    # Import lazily: each engine loads a library that takes seconds or may be missing.
    match params.backend:
        case "transformers":
            from l2l_core.mllm.engine_transformers import TransformersEngine

            return TransformersEngine(params)
        case "openai":
            from l2l_core.mllm.engine_openai import OpenAIEngine

            return OpenAIEngine(params)
        case _:
            from l2l_core.mllm.engine_vllm import VllmEngine

            return VllmEngine(params)


def _make_detector(params: PriorsParams) -> Detector:
    from l2l_core.mllm.engine_detector import TransformersDetector  # not at the top: it loads PyTorch

    return TransformersDetector(params)


def make_questions(index: records.IndexPaths, samples: int) -> list[Question]:
    """Every sentence, `samples` times, ordered by image so that a model can reuse what it computed for an image."""
    refs = records.to_frame(records.read_table(index.refs, records.REFS, ["sent_id", "image_id", "sentence"]))
    images = records.to_frame(records.read_table(index.images, records.IMAGES))
    known = refs.merge(images, on="image_id", validate="many_to_one").sort_values(["image_id", "sent_id"])
    columns = (known[name].tolist() for name in ("sent_id", "file_name", "height", "width", "sentence"))
    return [
        Question(sent_id, sample, file_name, (height, width), sentence)
        for sent_id, file_name, height, width, sentence in zip(*columns, strict=True)
        for sample in range(samples)
    ]


def query_key(params: PriorsParams, index: records.IndexPaths) -> str:
    """Hex digest of everything that responses depend on: a run reuses stored chunks only if its queries are the same.

    The code is not part of it, so that an interrupted run can resume after a fix. Raises InputError if a file cannot be
    read.
    """
    settings = params.model_dump(mode="json", exclude={"engine", "prices", "check_coords"})
    prompts = [prompt_sha256(params.prompt, space) for space in COORD_SPACES]
    digest = hashlib.sha256(json.dumps([settings, prompts, str(records.RESPONSES)]).encode())
    files = [index.images, index.refs]
    files += [index.objects] if params.backend == "simulated" else []
    files += [Path(str(params.replay_file))] if params.backend == "replay" else []
    for path in filter(Path.is_file, files):  # the backend reports missing files
        try:
            with path.open("rb") as file:  # read in blocks
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if params.backend in LIVE_BACKENDS:
        digest.update(folder_state(str(params.model)).encode())
    if params.backend == "replay" and Path(str(params.replay_file)).is_file():
        digest.update(files_state(mask_files(str(params.replay_file))).encode())
    return digest.hexdigest()[:16]


def query_all(
    make: MakeBackend,
    questions: Sequence[Question],
    folder: Path,
    params: PriorsParams,
    cluster: ClusterParams = ONE_PROCESS,
) -> pa.Table:
    """Query every question -> table records.RESPONSES, one row per (sent_id, sample_index), sorted by them.

    Each chunk is stored in `folder` as soon as it is complete; stored chunks are not queried again.
    make: builds the backend, in this process or in each of several `query_workers` (then it must be picklable).
    Raises L2LError if the backend cannot be built, returns no response at all or is killed; stored chunks stay.
    """
    size = params.engine.chunk_size
    chunks = [_Chunk(questions[start : start + size], folder) for start in range(0, len(questions), size)]
    waiting = [chunk for chunk in chunks if not chunk.is_stored()]
    queried = sum(len(chunk.questions) for chunk in waiting)
    stored = len(questions) - queried
    in_log = not sys.stderr.isatty()
    with tqdm(total=len(questions), initial=stored, desc="query", unit="request", disable=in_log, mininterval=1) as bar:
        rates, received, last_logged = _Rates(), stored, time.monotonic()
        for chunk, responses in _query_chunks(make, waiting, params, cluster):
            records.write_table(responses.drop_columns(VALID.name), chunk.path, records.RESPONSES)
            rates.add(responses)
            received += len(responses)
            bar.update(len(responses))
            bar.set_postfix_str(str(rates), refresh=False)
            if in_log and time.monotonic() - last_logged >= LOG_INTERVAL_S:
                last_logged = time.monotonic()
                print(f"query: {received} of {len(questions)}: {rates}", file=sys.stderr, flush=True)
    logger.info(f"query: {len(questions)} responses, {stored} of them stored before; {queried} queried: {rates}")
    tables = [records.RESPONSES.empty_table(), *(records.read_table(chunk.path, records.RESPONSES) for chunk in chunks)]
    order = [("sent_id", "ascending"), ("sample_index", "ascending")]
    return pa.concat_tables(tables).sort_by(order).combine_chunks()


def query_table(backend: PriorBackend, questions: Sequence[Question]) -> pa.Table:
    """Query every question at once -> table records.RESPONSES, sorted by sent_id and sample_index."""
    order = [("sent_id", "ascending"), ("sample_index", "ascending")]
    return _to_table(backend.name, questions, backend.query(questions)).sort_by(order).combine_chunks()


@dataclass(frozen=True)
class _Chunk:
    """Questions that are queried and stored together."""

    questions: Sequence[Question]
    folder: Path

    @property
    def path(self) -> Path:
        """Named after the questions: other chunk sizes or sentences give another file."""
        return self.folder / f"{hashlib.sha256(repr(list(self.questions)).encode()).hexdigest()[:24]}.parquet"

    @property
    def shown(self) -> str:
        """In messages."""
        sent_ids = list(dict.fromkeys(question.sent_id for question in self.questions))
        return name_units("query", sent_ids, f"{len(self.questions)} requests")

    def is_stored(self) -> bool:
        """Whether all its responses are stored. A torn file, or one with other rows, is moved aside with a note."""
        expected = sorted((question.sent_id, question.sample_index) for question in self.questions)

        def is_expected(stored: pa.Table) -> bool:
            rows = zip(stored["sent_id"].to_pylist(), stored["sample_index"].to_pylist(), strict=True)
            return sorted(rows) == expected

        return read_chunk(self.path, records.RESPONSES, "querying again", is_expected) is not None


class _Rates:
    """Speed and yield since the start of this run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._responses = self._valid = self._tokens = 0

    def add(self, responses: pa.Table) -> None:
        """Of a finished chunk, with the column VALID."""
        self._responses += len(responses)
        self._valid += pc.sum(responses[VALID.name]).as_py()
        self._tokens += sum(pc.sum(responses[name]).as_py() for name in ("prompt_tokens", "completion_tokens"))

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        valid = 100 * self._valid / max(self._responses, 1)
        tokens = f"{self._tokens / seconds:.0f} tokens/s, " if self._tokens else ""  # recorded responses have none
        return f"{self._responses / seconds:.1f} requests/s, {tokens}{valid:.1f} % valid"


def _query_chunks(
    make: MakeBackend, chunks: Sequence[_Chunk], params: PriorsParams, cluster: ClusterParams
) -> Iterator[tuple[_Chunk, pa.Table]]:
    """Query the chunks -> their responses, with the column VALID, in any order."""
    if not chunks:
        return
    workers = query_workers(params, cluster, len(chunks))
    # Which worker gets which chunk is not fixed; with chunks of similar length, it is every `count`-th.
    following = [*(chunk.questions for chunk in chunks[workers.count :]), *[()] * workers.count]
    tasks = (
        Task(number, chunk.shown, (chunk.questions, after))
        for number, (chunk, after) in enumerate(zip(chunks, following, strict=True))
    )
    job = Job("query", partial(_start_querying, make), workers)
    with limited_threads(workers.threads) if workers.count > 1 else nullcontext():
        for number, responses in executor_of(workers)(job, tasks, lambda rows: None):
            yield chunks[number], responses


def query_workers(params: PriorsParams, cluster: ClusterParams, chunks: int) -> Workers:
    """Processes of this machine or actors on Ray, at most one per chunk.

    Raises ConfigError if this machine has too few GPUs for its processes.
    """
    engine, is_local = params.engine, not queries_on_ray(params, cluster)
    if is_local:
        _refuse_too_few_gpus(params)
    count = min(worker_count(params), chunks)
    share = max(1, thread_count() // count)
    # Local processes share out the GPUs that are there. An actor waits until a node has as many as it asks for.
    needs_gpus = params.backend in COMPUTING_BACKENDS and (is_local or engine.device != "cpu")
    return Workers(
        executor="local" if is_local else "ray",
        count=count,
        threads=share if is_local else cluster.cpus_per_worker or share,
        gpus=engine.tensor_parallel if needs_gpus else 0,
        address=cluster.address,
        python=None if engine.python is None else sys.executable,
        fewer="priors.engine.data_parallel or batch_size",
        fewer_gpus="priors.engine.tensor_parallel, set priors.engine.device to cpu",
    )


def queries_on_ray(params: PriorsParams, cluster: ClusterParams) -> bool:
    """Whether `query` needs Ray: for a given number of engines, but not for the requests to a server.

    The server's key stays on this machine.
    """
    return cluster.executor == "ray" and params.engine.data_parallel != "auto" and params.backend != "openai"


def worker_count(params: PriorsParams) -> int:
    """Resolve `engine.data_parallel`. `auto` is 1, except for a small model on a CPU: one process per core.

    There, single-thread processes give a higher throughput than the threads of one process. Only the `transformers`
    and `detector` backends compute in their processes; a model is small if its folder has at most SMALL_BYTES.
    """
    wanted = params.engine.data_parallel
    if wanted != "auto":
        return wanted
    model = Path(str(params.model))
    if params.backend not in ("transformers", "detector") or not model.is_dir():
        return 1
    size = sum(path.stat().st_size for path in model.iterdir() if path.is_file())
    if thread_count() == 1 or size > SMALL_BYTES:
        return 1
    from l2l_core.core.device import choose_device  # not at the top: recorded and simulated responses need no torch

    if choose_device(params.engine.device, "params.yaml: priors.engine.device").type != "cpu":
        return 1
    return max(1, min(thread_count(), available_bytes() // WORKER_BYTES))


def _refuse_too_few_gpus(params: PriorsParams) -> None:
    """Processes without a GPU would silently compute on the CPU."""
    engine = params.engine
    processes = engine.data_parallel
    if params.backend not in COMPUTING_BACKENDS or engine.device == "cpu" or processes == "auto" or processes == 1:
        return
    import torch  # not at the top: recorded and simulated responses need no torch

    here, wanted = torch.cuda.device_count(), processes * engine.tensor_parallel
    if 0 < here < wanted:
        raise ConfigError(
            f"params.yaml: priors.engine: data_parallel {processes} x tensor_parallel "
            f"{engine.tensor_parallel} needs {wanted} GPUs, torch sees {here}; lower one of them"
        )


def _start_querying(make: MakeBackend) -> Compute:
    """The querying of a chunk: its questions and the following ones -> its responses, with the column VALID."""
    backend = make()

    def query(data: tuple[Sequence[Question], Sequence[Question]]) -> Iterator[pa.Table]:
        questions, following = data
        if isinstance(backend, ImageBackend):
            responses = backend.query(questions, following)
        else:
            responses = backend.query(questions)
        _refuse_only_errors(backend.name, responses)
        valid = pa.array([response.is_valid for response in responses], VALID.type)
        yield _to_table(backend.name, questions, responses).append_column(VALID, valid)

    return query


def _refuse_only_errors(backend: str, responses: Sequence[RawResponse]) -> None:
    failed = [response.reason for response in responses if response.failure == "error"]
    if len(failed) == len(responses) >= MIN_CHUNK_TO_STOP:
        reason, _ = Counter(failed).most_common(1)[0]
        raise InputError(
            f"priors.backend {backend}: {len(responses)} consecutive requests failed, most with {reason!r}"
        )


def _to_table(backend: str, questions: Sequence[Question], responses: Sequence[RawResponse]) -> pa.Table:
    columns: dict[str, list[object]] = {
        "sent_id": [question.sent_id for question in questions],
        "sample_index": [question.sample_index for question in questions],
        "backend": [backend] * len(questions),
        "model": [clean_text(response.model) for response in responses],
        "prompt_sha256": [response.prompt_sha256 for response in responses],
        "raw_text": [clean_text(response.raw_text) for response in responses],
        "mask": [response.mask for response in responses],
        "failure": [response.failure for response in responses],
        "reason": [response.reason for response in responses],
        "attempts": [response.attempts for response in responses],
        "coord_space": [response.coord_space for response in responses],
        "height": [question.image_hw[0] for question in questions],
        "width": [question.image_hw[1] for question in questions],
        "input_height": [response.input_hw[0] for response in responses],
        "input_width": [response.input_hw[1] for response in responses],
        "prompt_tokens": [response.prompt_tokens for response in responses],
        "completion_tokens": [response.completion_tokens for response in responses],
        "precision": [response.precision for response in responses],
    }
    return pa.Table.from_pydict(columns, schema=records.RESPONSES)
