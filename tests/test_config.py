"""params.yaml: the shipped file is valid, and every error names the key, the value and what is allowed."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from l2l_core.config import MAX_ROUND, PRESETS, ModelParams, TrainParams, load_params, parse_params
from l2l_core.errors import ConfigError, exit_code

PARAMS = Path(__file__).parents[1] / "params.yaml"
SHIPPED = yaml.safe_load(PARAMS.read_text())


def changed(key: str, value: object) -> dict[str, Any]:
    raw = copy.deepcopy(SHIPPED)
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target[section]
    target[last] = value
    return raw


def test_shipped_params_file_is_valid_and_round_trips():
    """`auto` becomes the preset's value; all else stays."""
    expected = SHIPPED | {section: SHIPPED[section] | values for section, values in PRESETS["tiny"].items()}
    assert load_params(PARAMS).model_dump(mode="json") == expected


# --- presets


def test_presets_set_the_same_keys_with_valid_values():
    keys = {section: list(values) for section, values in PRESETS["tiny"].items()}
    for name, preset in PRESETS.items():
        assert {section: list(values) for section, values in preset.items()} == keys
        params = parse_params(changed("model.preset", name))
        for section, values in preset.items():
            assert {key: getattr(getattr(params, section), key) for key in values} == values
    assert set(PRESETS) == set(ModelParams.model_fields["preset"].annotation.__args__)
    assert set(keys["model"]) < set(ModelParams.model_fields)
    assert set(keys["train"]) < set(TrainParams.model_fields)


def test_single_keys_override_the_preset():
    raw = changed("model.preset", "small")
    raw["model"]["image_size_px"], raw["train"]["lr"] = 320, 2e-4
    params = parse_params(raw)
    assert (params.model.image_size_px, params.train.lr) == (320, 2e-4)
    assert params.model.image_encoder == "efficientnet-lite0"
    assert params.train.batch_size == PRESETS["small"]["train"]["batch_size"]


def test_overrides_of_the_command_line_change_the_preset():
    params = load_params(PARAMS, overrides=["model.preset=full", "model.dim=64", "train.precision=auto"])
    assert (params.model.text_encoder, params.model.dim, params.train.lr_decay) == ("bert-base-uncased", 64, "poly")
    assert params.train.precision == "auto"  # of no preset: another meaning


@pytest.mark.parametrize("value", ["${seed}", "${nothing}", "${env:HOME}", "${"])
def test_explains_an_override_that_refers_to_no_value(value):
    with pytest.raises(ConfigError, match=r"^-S seed=\$\{.*; expected key=value of .*params\.yaml$"):
        load_params(PARAMS, overrides=[f"seed={value}"])


def test_params_files_without_a_preset_stay_valid():
    raw = changed("model", SHIPPED["model"] | PRESETS["tiny"]["model"])
    del raw["model"]["preset"]
    assert parse_params(raw) == load_params(PARAMS)


def test_explains_an_invalid_preset_in_one_line():
    with pytest.raises(ConfigError, match=r"^params\.yaml: model\.preset: got 'smal', expected one of 'tiny', 'small'"):
        parse_params(changed("model.preset", "smal"))


def test_docs_list_the_presets_values():
    rows = [line.split(" | ") for line in (PARAMS.parent / "docs/full_size.md").read_text().splitlines()]
    listed = {}
    for keys, *values in (row for row in rows if row[0].startswith("| `model.") or row[0].startswith("| `train.")):
        for number, key in enumerate(re.findall(r"`([\w.]+)`", keys)):
            listed[key] = [yaml.safe_load(re.split("[ ,]+ ?", cell)[number].strip("`")) for cell in values]
    expected = {f"{section}.{key}" for section, keys in PRESETS["tiny"].items() for key in keys}
    assert expected <= listed.keys()
    for name in expected:
        section, key = name.split(".")
        assert listed[name] == [preset[section][key] for preset in PRESETS.values()], name


def test_comments_of_the_params_file_list_the_presets_values():
    text = PARAMS.read_text()
    for section in ("model", "train"):
        block = re.search(rf"^{section}:.*?(?=^\w)", text, re.MULTILINE | re.DOTALL).group()
        for key in PRESETS["tiny"][section]:
            comment = re.search(rf"^  {key}: auto +# (.*)$", block, re.MULTILINE).group(1)
            listed = [yaml.safe_load(part.split()[0].strip(";,")) for part in comment.split("|")[:3]]
            assert listed == [PRESETS[name][section][key] for name in PRESETS], key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "x", "seed: got 'x', expected a valid integer"),
        ("seed", -1, "seed: got -1, expected greater than or equal to 0"),
        ("seed", 2**32, "seed: got 4294967296, expected less than"),
        ("round", MAX_ROUND + 1, f"round: got {MAX_ROUND + 1}, expected less than or equal to {MAX_ROUND}"),
        ("round", -1, "round: got -1"),
        ("round", True, "round: got True, expected a valid integer"),
        ("select.candidates", [], "select.candidates: got .*, expected List should have at least 1 item"),
        (
            "select.candidates",
            ["teacher", "teacher"],
            r"select.candidates.*got \['teacher', 'teacher'\].*each name once",
        ),
        ("select.candidates", ["best"], "select.candidates.*got 'best', expected one of 'teacher', 'ensemble'"),
        ("round", 1.0, r"round: got 1\.0, expected a valid integer"),
        ("dataset", "", "dataset: got '', expected at least 1 character"),
        ("dataset", None, "dataset: got None, expected a valid string"),
        ("split.labeled_fraction", 0, r"split\.labeled_fraction: got 0, expected greater than 0"),
        ("split.labeled_fraction", 1.5, r"split\.labeled_fraction: got 1\.5, expected less than or equal to 1"),
        ("split.labeled_fraction", float("nan"), r"split\.labeled_fraction: got nan, expected a finite number"),
        ("split.list_file", 3, r"split\.list_file: got 3, expected a valid string"),
        ("train.weight_decay", float("inf"), r"train\.weight_decay: got inf, expected a finite number"),
        ("train.lr", "fast", r"train\.lr: got 'fast', expected a valid number"),
        ("train.device", "cpu", r"train\.device: renamed, use train\.engine\.device"),
        ("train.micro_batch_size", 8, r"train\.micro_batch_size: renamed, use train\.engine\.micro_batch_size"),
        ("select.policy", "all", r"select\.policy: renamed, use select\.method"),
        ("retrain.passes", 2, r"retrain\.passes: renamed, use retrain\.num_passes"),
        ("select.fold_update", "further", r"select\.fold_update: 'further' was renamed, use 'continue'"),
        ("select.fold_update", "fresh", r"select\.fold_update: 'fresh' was renamed, use 'retrain'"),
        ("select.fold_update", "kept", r"select\.fold_update: 'kept' was renamed, use 'freeze'"),
        ("select.method", ["all"], r"select\.method: got \['all'\], expected one of 'reinforce'"),
        ("train.lrr", 1, r"train\.lrr: unknown parameter"),
        ("trian", {}, "trian: unknown parameter"),
        ("ingest", 3, "ingest: got 3, expected a section"),
        ("priors.backend", "vlm", r"priors\.backend: got 'vlm', expected one of 'simulated'"),
        ("priors.backend", "replay", r"priors\.replay_file: got null, expected a JSON-lines file"),
        (
            "priors.structured_output",
            "maybe",
            r"priors\.structured_output: got 'maybe', expected one of True, False, 'auto'",
        ),
        ("priors.model", None, r"priors\.model: got None, expected a model's name because backend is transformers"),
        (
            "priors.backend",
            "detector",
            r"priors\.model: got 'vlm/refshapes-vlm', which is no detector, expected one such",
        ),
        (
            "dataset",
            "mine",
            r"priors\.model: got 'vlm/refshapes-vlm', which knows data/refshapes alone, .*'mine': name",
        ),
        ("model.heads", 7, r"model\.heads: got 7, expected a divisor of dim \(64\)"),
        ("proposals.ring", "fitt", r"proposals\.ring: got 'fitt', expected a valid number or 'fit'$"),
        ("proposals.core", 1.0, r"proposals\.core: got 1.0, expected less than 1 or 'fit'$"),
        (
            "priors.engine.data_parallel",
            0,
            r"priors\.engine\.data_parallel: got 0, expected 'auto' or greater than or equal to 1$",
        ),
        ("evaluate.splits", ["tests"], r"evaluate\.splits\.0: got 'tests', expected one of 'train', 'val'"),
        ("evaluate.splits", [], r"evaluate\.splits: got \[\], expected"),
    ],
)
def test_explains_invalid_values(key, value, message):
    with pytest.raises(ConfigError, match=rf"params\.yaml: {message}"):
        parse_params(changed(key, value))


@pytest.mark.parametrize(
    "priors", [{"backend": "replay", "replay_file": "x"}, {"backend": "none"}, {"model": "Qwen/Qwen3-VL-8B"}]
)
def test_accepts_other_datasets_with_another_prior_source(priors):
    raw = changed("dataset", "mine")
    raw["priors"] |= priors
    assert parse_params(raw).dataset == "mine"
    raw["dataset"] = "./data/refshapes/"
    assert parse_params(raw)


@pytest.mark.parametrize("backend", ["transformers", "vllm", "openai"])
def test_enforces_json_by_default_only_without_extra_packages(backend):
    raw = changed("priors.backend", backend)
    assert parse_params(raw).priors.is_structured == (backend != "transformers")
    for said in (True, False):
        raw["priors"]["structured_output"] = said
        assert parse_params(raw).priors.is_structured == said


def test_lists_all_errors_at_once():
    raw = changed("round", 99)
    raw["seed"] = None
    del raw["train"]["lr"]
    raw["select"]["method"] = "magic"

    with pytest.raises(ConfigError) as caught:
        parse_params(raw)
    assert str(caught.value).startswith("4 problems:")
    for expected in ("round: got 99", "seed: got None", "train.lr: missing", "select.method: got 'magic'"):
        assert f"params.yaml: {expected}" in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "seed: 1", 3])
def test_refuses_params_that_are_not_a_mapping(raw):
    with pytest.raises(ConfigError, match="expected a mapping of sections"):
        parse_params(raw)


def test_names_an_unreadable_params_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: not found"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("seed: [1,\nround: }")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML: [^\n]*$"):
        load_params(tmp_path / "bad.yaml")


@settings(max_examples=25, deadline=None)  # each example writes and reads the whole file
@given(lr=st.floats(1e-12, 1.0))
@example(lr=1e-5)
def test_reads_numbers_as_written_by_dvc(lr, tmp_path_factory):
    """`dvc exp run -S train.lr=0.00001` writes 1e-05 to the file, which YAML 1.1 reads as a string."""
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(PARAMS.read_text())
    with modify_yaml(path) as raw:
        raw["train"]["lr"] = lr

    assert load_params(path).train.lr == lr


def test_params_are_immutable():
    params = load_params(PARAMS)
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3


def test_invalid_params_exit_with_code_2_and_one_line(tmp_path, capsys):
    (tmp_path / "params.yaml").write_text(PARAMS.read_text().replace("round: 2", "round: two"))

    assert exit_code(lambda: print(load_params(tmp_path / "params.yaml"))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path}/params.yaml: round: got 'two', expected a valid integer\n"


@pytest.mark.parametrize("method", ["threshold", "semires"])
def test_pixel_weighting_rules_require_the_teacher_mask_first(method):
    raw = changed("select.method", method)
    raw["select"]["candidates"] = ["overlap", "teacher"]
    with pytest.raises(ConfigError, match=rf"select\.candidates: got .*, expected teacher as the first .* {method}"):
        parse_params(raw)


def test_fixed_rules_use_only_the_first_candidate():
    def names(method):
        return parse_params(changed("select.method", method)).select.candidate_names

    assert names("reinforce") == names("oracle") == SHIPPED["select"]["candidates"]
    assert names("all") == names("semires") == ["teacher"]


def test_mean_teacher_cannot_cross_label():
    raw = changed("select.cross_label", True)
    assert parse_params(raw).select.uses_fold_teachers
    raw["select"]["method"] = "agreement"
    assert parse_params(raw).select.uses_fold_teachers
    raw["select"]["method"] = "mean_teacher"
    with pytest.raises(
        ConfigError, match=r"^params\.yaml: select\.cross_label: got true, .* method is mean_teacher: its"
    ):
        parse_params(raw)


def test_only_reinforce_can_evolve_proposals():
    raw = changed("retrain.evolve_proposals", True)
    assert parse_params(raw).retrain.evolve_proposals
    raw["select"]["method"] = "topk"
    with pytest.raises(
        ConfigError, match=r"^params\.yaml: retrain\.evolve_proposals: got true, .* select\.method is topk: only"
    ):
        parse_params(raw)


def test_the_candidate_sam_needs_a_model_only_where_it_is_used():
    raw = changed("select.candidates", ["teacher", "sam"])
    with pytest.raises(
        ConfigError, match=r"^params\.yaml: proposals\.model: got None, .* select\.candidates names sam$"
    ):
        parse_params(raw)
    raw["select"]["method"] = "agreement"  # takes the first candidate
    assert parse_params(raw).select.candidate_names == ["teacher"]
    raw["select"]["method"], raw["proposals"]["model"] = "reinforce", "facebook/sam-vit-base"
    assert parse_params(raw).select.candidate_names == ["teacher", "sam"]


# --- odd YAML


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("2020-13-45", "got '2020-13-45', which is no timestamp"),
        ("0x_", "got '0x_', which is no int"),
        ("0b_", "got '0b_', which is no int"),
        ("9" * 5000, r"got '9{59}\.\.\., which is no int"),
        ("!!bool x", "got 'x', which is no bool"),
        ("!!float x", "got 'x', which is no float"),
        ("!!timestamp x", "got 'x', which is no timestamp"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("[" * 5000, "not YAML that can be read: nested too deeply"),
        ("&a [*a]", r"got an alias \(\*name\), expected the value itself"),
        ("{<<: &a {b: 1}}", None),
        ("2020-01-01", None),
        ("{? [1] : 2}", "found unhashable key"),
        ("\x07", "special characters are not allowed"),
        ("!!binary x", "failed to decode base64 data"),
        ("!!omap [a: 1]", None),
    ],
)
def test_names_the_place_of_odd_yaml_in_one_line(tmp_path, written, reason):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text().replace("seed: 0", f"seed: {written}", 1))
    expected = r"seed: got .*, expected a valid integer" if reason is None else reason
    with pytest.raises(ConfigError, match=rf"^{path}: .*{expected}[^\n]*$"):
        load_params(path)


def test_aliases_that_stand_for_a_huge_document_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    (tmp_path / "params.yaml").write_text("\n".join(lines) + "\nseed: *a59\n")
    with pytest.raises(ConfigError, match=r"got an alias .* line 2"):
        load_params(tmp_path / "params.yaml")


def test_refuses_a_pipe_and_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in ((tmp_path / "pipe.yaml", "not a regular file"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=rf"{path}: {kind}, expected a YAML file$"):
            load_params(path)
