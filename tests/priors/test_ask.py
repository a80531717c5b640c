from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from prior_tables import Index, image_row, random_scenes, ref_row

from l2l_core import records
from l2l_core.config import PriorsParams
from l2l_core.errors import ConfigError, InputError
from l2l_core.priors import ask
from l2l_core.priors.ask import collect_priors, make_backend, make_questions, summarize
from l2l_core.priors.backend import Answer, Question
from l2l_core.priors.prompt import answer_schema, prompt_sha256, prompt_text

PARAMS = PriorsParams(backend="simulated", preset="llava-1.5-7b", samples=1, replay_file=None, coord_space="auto")


class Echo:
    """Answers with the sentence itself."""

    name = "echo"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.batches.append(len(questions))
        return [Answer(question.sentence, "echo-1", "pixel", question.image_hw) for question in questions]


def test_questions_are_ordered_by_image(tmp_path: Path) -> None:
    index = Index(
        pd.DataFrame([image_row(2, 30, 40), image_row(1, 10, 20)]),
        pd.DataFrame([ref_row(7, 2, "b", None), ref_row(9, 1, "c", None, split="train"), ref_row(3, 2, "a", None)]),
        pd.DataFrame([]),
    )
    asked = make_questions(index.save(tmp_path), samples=2)
    assert [(question.sent_id, question.sample_index) for question in asked] == [
        (9, 0),
        (9, 1),
        (3, 0),
        (3, 1),
        (7, 0),
        (7, 1),
    ]
    assert asked[2] == Question(3, 0, "images/2.png", (30, 40), "a")


def test_the_table_has_the_whole_schema_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "BATCH_QUESTIONS", 2)
    sentences = [
        '{"bbox": [1, 2, 9, 9], "target": "cup", "attributes": ["red"], "confidence": 0.5}',
        "no \ud800 idea",
        "(1, 2)",
    ]
    rows = [Question(sent_id, 0, "x.png", (10, 20), text) for sent_id, text in zip((5, 3, 4), sentences, strict=True)]
    backend = Echo()
    table = collect_priors(backend, rows)
    assert backend.batches == [2, 1]
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
        "latency_ms": 0.0,
    }
    assert {key: read[2][key] for key in wanted} == wanted
    assert summarize(table) == "priors: 3 answers, 1 ok, 0 empty, 2 invalid, 0 error"


def test_failed_requests_are_kept_as_errors() -> None:
    class Broken(Echo):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            return [replace(answer, raw_text="", unread="error") for answer in super().ask(questions)]

    table = collect_priors(Broken(), [Question(1, 0, "x.png", (10, 20), "cup")])
    assert table["status"].to_pylist() == ["error"]
    assert table["bbox"].to_pylist() == [None]


def test_nothing_to_ask_is_an_empty_table() -> None:
    assert collect_priors(Echo(), []).schema == records.PRIORS


def test_the_whole_way_is_the_same_to_the_byte(tmp_path: Path) -> None:
    index = random_scenes(images=30).save(tmp_path)
    files = []
    for name in ("first", "second"):
        questions = make_questions(index, samples=2)
        table = collect_priors(make_backend(PARAMS, 7, index), questions)
        records.write_table(table, tmp_path / name, records.PRIORS)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_replay_opens_no_truth(tmp_path: Path) -> None:
    """Only `simulated` may read the objects; and replay's sentences need no box."""
    index = Index(
        pd.DataFrame([image_row(1, 10, 20)]), pd.DataFrame([ref_row(5, 1, "cup", None)]), pd.DataFrame([])
    ).save(tmp_path)
    index.objects.unlink()
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"sent_id": 5, "raw_text": "[1, 1, 9, 9]", "coord_space": "pixel"}')
    params = PARAMS.model_copy(update={"backend": "replay", "replay_file": str(answers)})
    table = collect_priors(make_backend(params, 0, index), make_questions(index, 1))
    assert table["bbox"].to_pylist() == [[1, 1, 9, 9]]


def test_simulated_refuses_data_without_boxes(tmp_path: Path) -> None:
    index = Index(
        pd.DataFrame([image_row(1, 10, 20)]), pd.DataFrame([ref_row(5, 1, "cup", None)]), pd.DataFrame([])
    ).save(tmp_path)
    with pytest.raises(InputError, match=r"1 of 1 sentences have no true box .*sent_id 5"):
        make_backend(PARAMS, 0, index)


def test_a_replayed_model_of_unknown_family(tmp_path: Path) -> None:
    index = random_scenes(images=1).save(tmp_path)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"sent_id": 0, "raw_text": "x", "model": "odd"}')
    params = PARAMS.model_copy(update={"backend": "replay", "replay_file": str(answers)})
    with pytest.raises((InputError, ConfigError), match=r"line 1: priors\.coord_space"):
        make_backend(params, 0, index)


def test_the_prompt_says_what_is_asked() -> None:
    text = prompt_text('the {red} "cup"', "norm1000")
    assert 'the {red} "cup"' in text
    assert "from 0 to 1000" in text
    properties = answer_schema("unit")["properties"]
    assert isinstance(properties, dict)
    assert all(f'"{key}"' in text for key in properties)


def test_the_fingerprint_changes_with_the_question() -> None:
    assert len(prompt_sha256("unit")) == 64
    assert prompt_sha256("unit") == prompt_sha256("unit")
    assert len({prompt_sha256(space) for space in ("pixel", "norm1000", "percent", "unit")}) == 4
