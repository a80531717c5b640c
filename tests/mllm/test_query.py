"""Querying: questions, chunks on disk, cache invalidation, and workers."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from prior_tables import ROOT, Index, collect_priors, image_row, prior_params, random_scenes, ref_row

from l2l_core.artifacts import records
from l2l_core.config import ONE_PROCESS, ClusterParams, PriorsParams
from l2l_core.errors import ConfigError, InputError, L2LError
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.query import (
    MIN_CHUNK_TO_STOP,
    SMALL_BYTES,
    make_backend,
    make_questions,
    query_all,
    query_key,
    query_table,
    query_workers,
    worker_count,
)
from l2l_core.priors.table import interpret

PARAMS = prior_params()


@dataclass
class Echo:
    """Returns each sentence as the response and records the queries; the sentence `fails` interrupts it."""

    fails: str = ""
    name: str = "echo"
    queried: list[list[int]] = field(default_factory=list)

    def query(self, questions: Sequence[Question]) -> list[RawResponse]:
        self.queried.append([question.sent_id for question in questions])
        if any(question.sentence == self.fails for question in questions):
            raise KeyboardInterrupt
        return [RawResponse(question.sentence, "echo-1", "pixel", question.image_hw) for question in questions]


def questions(count: int) -> list[Question]:
    return [Question(number, 0, "x.png", (10, 20), f"thing {number}") for number in range(count)]


def test_backend_none_produces_empty_priors(tmp_path: Path) -> None:
    index = Index(pd.DataFrame([image_row(2, 30, 40)]), pd.DataFrame([ref_row(7, 2, "b", None)]), pd.DataFrame([]))
    paths = index.save(tmp_path)
    table = collect_priors(make_backend(prior_params(backend="none"), paths), make_questions(paths, 2))
    rows = records.to_frame(table)
    assert rows[["backend", "status"]].to_numpy().tolist() == [["none", "empty"]] * 2
    assert rows["bbox"].isna().all()


def test_questions_are_ordered_by_image(tmp_path: Path) -> None:
    index = Index(
        pd.DataFrame([image_row(2, 30, 40), image_row(1, 10, 20)]),
        pd.DataFrame([ref_row(7, 2, "b", None), ref_row(9, 1, "c", None, split="train"), ref_row(3, 2, "a", None)]),
        pd.DataFrame([]),
    )
    made = make_questions(index.save(tmp_path), samples=2)
    assert [(question.sent_id, question.sample_index) for question in made] == [
        (9, 0),
        (9, 1),
        (3, 0),
        (3, 1),
        (7, 0),
        (7, 1),
    ]
    assert made[2] == Question(3, 0, "images/2.png", (30, 40), "a")


def test_tables_have_their_full_schemas_and_are_sorted(tmp_path: Path) -> None:
    sentences = [
        '{"bbox": [1, 2, 9, 9], "target": "cup", "attributes": ["red"], "confidence": 0.5}',
        "no \ud800 idea",
        "(1, 2)",
    ]
    rows = [Question(sent_id, 0, "x.png", (10, 20), text) for sent_id, text in zip((5, 3, 4), sentences, strict=True)]
    assert query_table(Echo(), rows).schema == records.RESPONSES
    table = collect_priors(Echo(), rows)
    assert table.schema == records.PRIORS
    records.write_table(table, tmp_path / "priors.parquet", records.PRIORS)
    read = records.read_table(tmp_path / "priors.parquet", records.PRIORS).to_pylist()
    assert [row["sent_id"] for row in read] == [3, 4, 5]
    assert [row["status"] for row in read] == ["invalid", "invalid", "ok"]
    assert read[0]["raw_text"] == "no ? idea"
    wanted = {
        "backend": "echo",
        "model": "echo-1",
        "target": "cup",
        "attributes": ["red"],
        "bbox": [1, 2, 9, 9],
        "point": None,
        "score": 0.5,
        "coord_space": "pixel",
        "input_height": 10,
        "input_width": 20,
    }
    assert {key: read[2][key] for key in wanted} == wanted


def test_failed_requests_are_stored_as_errors() -> None:
    class Broken(Echo):
        def query(self, questions: Sequence[Question]) -> list[RawResponse]:
            responses = super().query(questions)
            return [replace(response, raw_text="", failure="error", reason="HTTP 500") for response in responses]

    made = [Question(1, 0, "x.png", (10, 20), "cup")]
    assert query_table(Broken(), made)["reason"].to_pylist() == ["HTTP 500"]
    table = collect_priors(Broken(), made)
    assert table["status"].to_pylist() == ["error"]
    assert table["bbox"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("preset", "samples", "sha256"),
    [
        ("llava-1.5-7b", 1, "9492a10be2f49402dcf9ec74f6a7790b66335be2c87c69c04c24621c3255931c"),
        ("llava-1.5-7b", 2, "e3e116d5aa42f04d15d3658bbd39af6c04f5b9183a3b5b65c3a5336149203339"),
        ("qwen2.5-vl-7b", 2, "002f5aabac1b6e08d0320f4ab6f64dc5a2f41387d05596161c4952f8d515a522"),
    ],
)
def test_simulated_priors_stay_the_same_to_the_last_digit(
    tmp_path: Path, preset: str, samples: int, sha256: str
) -> None:
    """Published results use such priors: a change here makes them irreproducible. Those priors are older than the
    column `mask`, which is null here. The hash covers the rows, not the file, whose bytes depend on the Parquet writer.
    """
    index = random_scenes(images=30).save(tmp_path)
    params = prior_params(preset=preset, seed=7, engine={"chunk_size": 17})
    (tmp_path / "chunks").mkdir()
    responses = query_all(
        partial(make_backend, params, index), make_questions(index, samples), tmp_path / "chunks", params
    )
    priors = interpret(responses)
    assert priors["mask"].null_count == len(priors)
    rows = repr(priors.drop_columns("mask").to_pylist())
    assert hashlib.sha256(rows.encode()).hexdigest() == sha256


def test_replay_does_not_read_ground_truth(tmp_path: Path) -> None:
    """Only `simulated` may read the objects; replayed sentences need no true box."""
    index = Index(
        pd.DataFrame([image_row(1, 10, 20)]), pd.DataFrame([ref_row(5, 1, "cup", None)]), pd.DataFrame([])
    ).save(tmp_path)
    index.objects.unlink()
    recorded = tmp_path / "responses.jsonl"
    recorded.write_text('{"sent_id": 5, "raw_text": "[1, 1, 9, 9]", "coord_space": "pixel"}')
    params = prior_params(backend="replay", replay_file=str(recorded))
    query_key(params, index)
    table = collect_priors(make_backend(params, index), make_questions(index, 1))
    assert table["bbox"].to_pylist() == [[1, 1, 9, 9]]


def test_simulated_refuses_data_without_boxes(tmp_path: Path) -> None:
    index = Index(
        pd.DataFrame([image_row(1, 10, 20)]), pd.DataFrame([ref_row(5, 1, "cup", None)]), pd.DataFrame([])
    ).save(tmp_path)
    with pytest.raises(InputError, match=r"1 of 1 sentences have no true box .*sent_id 5"):
        make_backend(PARAMS, index)


def test_replay_refuses_a_model_of_unknown_family(tmp_path: Path) -> None:
    index = random_scenes(images=1).save(tmp_path)
    recorded = tmp_path / "responses.jsonl"
    recorded.write_text('{"sent_id": 0, "raw_text": "x", "model": "odd"}')
    params = prior_params(backend="replay", replay_file=str(recorded))
    with pytest.raises((InputError, ConfigError), match=r"line 1: priors\.coord_space"):
        make_backend(params, index)


@pytest.mark.parametrize("backend", ["transformers", "openai", "vllm"])
def test_refuses_a_model_of_unknown_family_before_loading_it(tmp_path: Path, backend: str) -> None:
    params = prior_params(backend=backend, model="no/such-model")
    with pytest.raises(ConfigError, match=r"priors\.coord_space: got 'auto', .*'no/such-model' is unknown; set it to"):
        make_backend(params, records.IndexPaths())


@pytest.mark.parametrize("backend", ["transformers", "openai", "vllm", "detector"])
def test_real_backends_require_a_model_name(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"model: got None, .* because backend is {backend}"):
        prior_params(backend=backend)


# Chunks


def test_resuming_reuses_stored_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stops in the third of four chunks. Resuming queries only the missing ones; the table is equal."""
    params = prior_params(engine={"chunk_size": 3})
    first = Echo(fails="thing 7")
    with pytest.raises(KeyboardInterrupt):
        query_all(lambda: first, questions(10), tmp_path, params)
    assert first.queried == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    second = Echo()
    table = query_all(lambda: second, questions(10), tmp_path, params)
    assert second.queried == [[6, 7, 8], [9]]
    assert re.fullmatch(
        r"query: 10 responses, 6 of them stored before; 4 queried: [\d.]+ requests/s, 100\.0 % valid\n",
        capsys.readouterr().out,
    )
    assert table == query_table(Echo(), questions(10))


def test_a_partially_written_file_is_not_used_as_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies while writing a chunk; the write goes to a temporary name first."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    params = prior_params(engine={"chunk_size": 3})
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            query_all(Echo, questions(5), tmp_path, params)
    (tmp_path / ".left.tmp").write_bytes(b"PAR1")
    again = Echo()
    assert query_all(lambda: again, questions(5), tmp_path, params) == query_table(Echo(), questions(5))
    assert again.queried == [[0, 1, 2], [3, 4]]


def test_builds_no_backend_when_all_chunks_are_stored(tmp_path: Path) -> None:
    def refuse() -> Echo:
        raise AssertionError

    whole = query_all(Echo, questions(5), tmp_path, PARAMS)
    assert query_all(refuse, questions(5), tmp_path, PARAMS) == whole


def test_no_questions_give_an_empty_table(tmp_path: Path) -> None:
    assert query_all(Echo, [], tmp_path, PARAMS).schema == records.RESPONSES


def test_changed_sentences_invalidate_stored_chunks(tmp_path: Path) -> None:
    query_all(Echo, questions(5), tmp_path, PARAMS)
    changed = [replace(question, sentence=question.sentence.upper()) for question in questions(5)]
    table = query_all(Echo, changed, tmp_path, PARAMS)
    assert table["raw_text"].to_pylist() == [f"THING {number}" for number in range(5)]


def test_stores_nothing_when_every_request_fails(tmp_path: Path) -> None:
    """A dead server or a full GPU must not fill the table with errors; a few bad requests must not stop the run."""

    class Down(Echo):
        def query(self, questions: Sequence[Question]) -> list[RawResponse]:
            return [replace(response, failure="error", reason="HTTP 503") for response in super().query(questions)]

    with pytest.raises(
        InputError, match=rf"{MIN_CHUNK_TO_STOP} consecutive requests failed, .*'HTTP 503' .*rerun to resume"
    ):
        query_all(Down, questions(MIN_CHUNK_TO_STOP), tmp_path, PARAMS)
    assert list(tmp_path.iterdir()) == []
    few = query_all(Down, questions(MIN_CHUNK_TO_STOP - 1), tmp_path, PARAMS)
    assert few["failure"].to_pylist() == ["error"] * (MIN_CHUNK_TO_STOP - 1)


@pytest.mark.parametrize("workers", [2])
def test_multiple_processes_give_the_same_bytes(tmp_path: Path, workers: int) -> None:
    index = random_scenes(images=40).save(tmp_path)
    files = []
    for count in (1, workers):
        params = prior_params(engine={"chunk_size": 9, "data_parallel": count})
        folder = tmp_path / str(count)
        folder.mkdir()
        make = partial(make_backend, params, index)
        table = query_all(make, make_questions(index, 1), folder, params)
        records.write_table(table, folder / "responses", records.RESPONSES)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(files[0]) == 10  # nine chunks and the full table
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("backend", "device", "weights", "threads", "expected"),
    [
        ("transformers", "cpu", 1000, "4", 4),
        ("transformers", "cpu", 1000, "1", 1),
        ("transformers", "cpu", SMALL_BYTES + 1, "4", 1),  # each process would hold a copy of the weights
        ("transformers", "cuda", 1000, "4", 1),
        ("openai", "cpu", 1000, "4", 1),  # the server does the work
        ("detector", "cpu", 1000, "4", 4),
    ],
)
def test_auto_uses_one_process_per_core_only_for_a_small_model_on_a_cpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    device: str,
    weights: int,
    threads: str,
    expected: int,
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    params = prior_params(backend=backend, model=str(tmp_path), engine={"data_parallel": "auto", "device": "auto"})
    assert worker_count(params) == expected


def test_a_worker_error_is_reported_in_one_line(tmp_path: Path) -> None:
    index = random_scenes(images=2).save(tmp_path)
    params = prior_params(backend="replay", replay_file="nowhere.jsonl", engine={"chunk_size": 1, "data_parallel": 2})
    with pytest.raises(InputError, match=r"^nowhere\.jsonl: not found"):
        query_all(partial(make_backend, params, index), make_questions(index, 1), tmp_path, params)


@dataclass
class Killed(Echo):
    """Kills its own process at a sentence, once so many files are in the folder, as the out-of-memory killer might."""

    at: str = ""
    folder: Path = Path()
    files: int = 0

    def query(self, questions: Sequence[Question]) -> list[RawResponse]:
        if any(question.sentence == self.at for question in questions):
            while len(list(self.folder.glob("*.parquet"))) < self.files:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().query(questions)


def test_a_killed_worker_loses_only_its_own_chunk(tmp_path: Path) -> None:
    """The worker of the first chunk dies when the other has finished all others."""
    params = prior_params(engine={"chunk_size": 2, "data_parallel": 2})
    make = partial(Killed, at="thing 0", folder=tmp_path, files=4)
    with pytest.raises(
        L2LError,
        match=r"^query: a worker process was killed, .*\(lower priors\.engine\.data_parallel or .* rerun to resume$",
    ):
        query_all(make, questions(10), tmp_path, params)
    assert len(list(tmp_path.iterdir())) == 4
    rest = Echo()
    one = prior_params(engine={"chunk_size": 2})
    assert query_all(lambda: rest, questions(10), tmp_path, one) == query_table(Echo(), questions(10))
    assert rest.queried == [[0, 1]]


def test_a_faulty_backend_is_named_with_the_sentences_of_its_chunk(tmp_path: Path) -> None:
    class Faulty(Echo):
        def query(self, questions: Sequence[Question]) -> list[RawResponse]:
            raise ValueError("broken\nvalue")

    params = prior_params(engine={"chunk_size": 3})
    with pytest.raises(L2LError, match=r"^query: sent_id 0, 1, 2: ValueError: broken value \(at test_query"):
        query_all(Faulty, questions(5), tmp_path, params)


@pytest.mark.parametrize("backend", ["transformers", "vllm", "detector"])
def test_refuses_more_processes_than_the_gpus_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    engine = {"data_parallel": 2, "tensor_parallel": 2}
    params = prior_params(backend=backend, model="Qwen2.5-VL-7B", engine=engine)
    with pytest.raises(ConfigError, match=r"data_parallel 2 x tensor_parallel 2 needs 4 GPUs, torch sees 3"):
        query_all(Echo, questions(4), tmp_path, params)
    on_ray = ClusterParams.model_validate(ONE_PROCESS.model_dump() | {"executor": "ray"})
    assert query_workers(params, on_ray, chunks=9).gpus == 2  # this machine's GPUs do not count


@pytest.mark.parametrize(
    ("backend", "engine", "expected"),
    [
        ("vllm", {"data_parallel": 32, "tensor_parallel": 2}, ("ray", 32, 4, 2)),
        ("transformers", {"data_parallel": 1}, ("ray", 1, 4, 1)),
        ("detector", {"data_parallel": 40, "device": "cpu"}, ("ray", 32, 4, 0)),  # no more than chunks
        ("simulated", {"data_parallel": 2}, ("ray", 2, 4, 0)),
        ("vllm", {"data_parallel": "auto"}, ("local", 1, 6, 1)),  # no number: this machine's choice
        ("openai", {"data_parallel": 3}, ("local", 3, 2, 0)),  # the key of the server stays here
    ],
)
def test_a_given_number_of_engines_runs_on_ray(
    monkeypatch: pytest.MonkeyPatch, backend: str, engine: dict[str, object], expected: tuple[str, int, int, int]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    changes = {"executor": "ray", "address": "auto", "cpus_per_worker": 4, "workers": 7, "gpus_per_worker": 3}
    cluster = ClusterParams.model_validate(ONE_PROCESS.model_dump() | changes)
    workers = query_workers(prior_params(backend=backend, model="Qwen2.5-VL-7B", engine=engine), cluster, chunks=32)
    assert (workers.executor, workers.count, workers.threads, workers.gpus) == expected
    assert workers.address == "auto"


@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore")
def test_two_actors_of_an_own_ray_cluster_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    index = random_scenes(images=20).save(tmp_path)
    files = []
    for count, executor in ((1, "local"), (2, "ray")):
        params = prior_params(engine={"chunk_size": 9, "data_parallel": count})
        cluster = ClusterParams.model_validate(ONE_PROCESS.model_dump() | {"executor": executor})
        (folder := tmp_path / executor).mkdir()
        table = query_all(partial(make_backend, params, index), make_questions(index, 1), folder, params, cluster)
        records.write_table(table, folder / "responses", records.RESPONSES)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(files[0]) > 4
    assert files[0] == files[1]


# Invalidation of stored responses


def test_dvc_reruns_query_only_for_settings_that_change_it() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    tracked = {name.removeprefix("priors.") for name in stages["query"]["params"]}
    assert tracked == PriorsParams.model_fields.keys() - {"engine", "prices", "check_coords"}
    code = [path for stage in ("query", "priors") for path in stages[stage]["deps"] if path.endswith("parse.py")]
    assert code == ["l2l_core/priors/parse.py"]  # only of `priors`: changing the parser does not query the model again
    assert "l2l_core/priors/parse.py" in stages["priors"]["deps"]


def test_cache_key_changes_with_the_query(tmp_path: Path) -> None:
    index = random_scenes(images=2).save(tmp_path)
    recorded = tmp_path / "responses.jsonl"
    recorded.write_text("{}")
    real = {"backend": "openai", "model": "qwen2.5-vl-7b"}
    settings: list[dict[str, object]] = [
        {},
        {"samples": 2},
        {"seed": 1},
        {"preset": "qwen2.5-vl-7b"},
        real,
        real | {"model": "qwen3-vl-8b"},
        real | {"prompt": "box-1"},
        real | {"temperature": 0.5},
        {"backend": "replay", "replay_file": str(recorded)},
    ]
    keys = [query_key(prior_params(**changes), index) for changes in settings]
    recorded.write_text("{ }")
    keys.append(query_key(prior_params(backend="replay", replay_file=str(recorded)), index))
    random_scenes(images=2, seed=1).save(tmp_path)
    keys.append(query_key(PARAMS, index))
    assert len(set(keys)) == len(keys)


def test_cache_key_ignores_engine_and_price_settings(tmp_path: Path) -> None:
    index = random_scenes(images=2).save(tmp_path)
    elsewhere = prior_params(engine={"data_parallel": 8, "server_url": "http://other:1/v1"})
    priced = prior_params(prices={"prompt": 1.0, "completion": 2.0})
    assert {query_key(params, index) for params in (elsewhere, priced)} == {query_key(PARAMS, index)}


# Torn stored responses


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """With one other byte among the values."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("spoil", [half, flipped, lambda _: b""])
def test_a_torn_chunk_is_moved_aside_and_queried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[bytes], bytes]
) -> None:
    params = prior_params(engine={"chunk_size": 2})
    whole = query_all(Echo, questions(6), tmp_path, params)
    torn, *others = sorted(tmp_path.iterdir())
    torn.write_bytes(spoil(torn.read_bytes()))
    capsys.readouterr()
    assert query_all(Echo, questions(6), tmp_path, params).equals(whole)
    captured = capsys.readouterr()
    assert f"note: {torn}: torn, moved to {torn.name}.torn; querying again" in captured.err
    assert "6 responses, 4 of them stored before; 2 queried" in captured.out
    assert sorted(tmp_path.iterdir()) == sorted([torn, torn.with_name(f"{torn.name}.torn"), *others])


def test_a_chunk_with_other_rows_is_queried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = prior_params(engine={"chunk_size": 3})
    whole = query_all(Echo, questions(6), tmp_path, params)
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(second.read_bytes())
    assert query_all(Echo, questions(6), tmp_path, params).equals(whole)
    assert f"note: {first}: not the expected rows, moved to" in capsys.readouterr().err
