"""Prediction on user images: masks match the stage `predict`, and output is written completely or not at all."""

import json
import re
import shutil
import socket
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from called import call
from PIL import Image
from synthetic_run import write_run
from tiny_detectors import save_tiny_owlv2
from torch import nn
from toy_pairs import MODEL, toy_params

from bench.stub_server import Stub, completion, sentence_of, serve
from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.images import EXIF_ORIENTATION, inspect_images
from l2l_core.core.masks import decode_rle, encode_rle, segmentation_to_rle
from l2l_core.data.pairs import BatchMaker, load_pairs
from l2l_core.datasets.jsonl import read_jsonl
from l2l_core.errors import ConfigError, InputError
from l2l_core.evaluation.predict import extend_history
from l2l_core.inference import predict_files
from l2l_core.inference.predictor import Predictor
from l2l_core.mllm.query import make_backend, make_questions, query_table
from l2l_core.model.segmenter import Segmenter
from l2l_core.priors.proposals import make_proposals
from l2l_core.priors.table import interpret

# grabcut reads the images; batches of a power of two, as in params.yaml.
PARAMS = toy_params(proposals={"size_px": 24, "renderer": "grabcut"}, evaluate={"batch_size": 16})
MODEL_FOLDER = records.round_folder(0) / "model"


def lively_network(seed: int) -> Segmenter:
    """An untrained network whose masks have some structure: strong logits around a mean of zero."""
    network = Segmenter.create(MODEL, ["left dark dot"], seed=seed)
    last = next(module for module in network.decoder.head.modules() if isinstance(module, nn.Conv2d))
    torch.manual_seed(seed)
    nn.init.normal_(last.weight, std=3.0)
    nn.init.zeros_(last.bias)
    network.proposals, network.precision = PARAMS.proposals, PARAMS.train.precision
    network.precision_setting = PARAMS.train.precision
    return network


def alike(first: bytes, second: bytes, height: int = 48, width: int = 64) -> bool:
    """Equal masks, except for pixels with a logit near 0: another batch size changes the order of summation."""
    return bool((decode_rle(first, height, width) != decode_rle(second, height, width)).mean() < 2e-3)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A project after round 0: index with image hashes, priors, network, and the predictions of the stage."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_run(root, rounds=0, images_per_split=5)
        (root / "params.yaml").write_text(yaml.safe_dump(PARAMS.model_dump()))
        records.RENDERING_PATH.write_text(json.dumps({"proposals": PARAMS.proposals.model_dump()}))
        for number, folder in enumerate((records.SUPERVISED_FOLDER, records.round_folder(0))):
            lively_network(number).save(folder / "model")
        patch.setattr("l2l_core.evaluation.predict.training_rows", lambda curves, model: [])
        extend_history(PARAMS, 0)
    return root


@pytest.fixture
def run(whole_run, tmp_path, monkeypatch):
    """A copy of `whole_run` as the current folder."""
    shutil.copytree(whole_run, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def evaluated(with_prior: bool) -> dict[tuple[str, str], bytes]:
    """(image, sentence) -> the mask written by the stage."""
    table = records.read_table(records.round_folder(0) / "history/predictions.parquet", records.PREDICTIONS)
    rles = {
        row["sent_id"]: row["rle_counts"]
        for row in table.to_pylist()
        if row["model"] == "round_0" and row["with_prior"] == with_prior
    }
    refs = records.to_frame(records.read_table(records.INDEX.refs, records.REFS))
    known = refs.merge(records.to_frame(records.read_table(records.INDEX.images, records.IMAGES)), on="image_id")
    known = known[known["sent_id"].isin(rles)]
    masks = {
        (row.file_name, row.sentence): rles[row.sent_id] for row in known.itertuples() if row.sentence.find("<") < 0
    }
    foreground = np.mean([decode_rle(rle, 48, 64).mean() for rle in masks.values()])
    assert len(masks) >= 10
    assert len(set(masks.values())) > len(masks) / 2  # something to compare
    assert 0.05 < foreground < 0.95
    return masks


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# --- the evaluated masks


def test_python_api_gives_the_evaluated_mask(run):
    predictor = Predictor.from_pretrained("data/rounds/0/model")
    for (image, sentence), rle in evaluated(with_prior=False).items():
        mask = predictor(image, sentence).mask
        assert mask.dtype == bool
        assert alike(encode_rle(mask), rle)


@pytest.mark.parametrize("with_prior", [True, False])
def test_single_and_batched_pairs_give_the_evaluated_mask(run, with_prior):
    expected = evaluated(with_prior)
    predictor = Predictor.from_pretrained(MODEL_FOLDER)

    def masks(keys):
        files = inspect_images([run / image for image, _ in keys], 1)
        requested = predict_files.PairList(files, [sentence for _, sentence in keys])
        prior_tables = predict_files.get_priors(requested, PARAMS) if with_prior else None
        return predict_files.predict_masks(predictor, requested, prior_tables, 32)

    together = masks(list(expected))
    assert all(map(alike, together.rle, expected.values()))
    assert together.with_prior.any() == with_prior
    for key in list(expected)[:4]:
        assert alike(masks([key]).rle[0], expected[key])


def test_finds_a_prior_by_image_bytes_and_sentence(run):
    """A renamed file is the same image; a changed pixel or word makes another pair."""
    (image, sentence), rle = next(iter(evaluated(with_prior=True).items()))
    shutil.copy(image, "renamed.png")
    pixels = np.asarray(Image.open(image)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save("changed.png")
    files = inspect_images([run / name for name in ("renamed.png", "changed.png", "renamed.png")], 1)
    requested = predict_files.PairList(files, [sentence, sentence, sentence + " there"])
    prior_tables = predict_files.recorded_priors(requested)
    assert np.isin(prior_tables.sent_id, prior_tables.proposals["sent_id"].to_numpy()).tolist() == [True, False, False]
    predicted = predict_files.predict_masks(Predictor.from_pretrained(MODEL_FOLDER), requested, prior_tables)
    assert alike(predicted.rle[0], rle)
    assert predicted.with_prior.tolist() == [True, False, False]


# --- the command


def test_predict_writes_masks_overlays_and_json_lines(run, monkeypatch, capsys):
    expected = evaluated(with_prior=False)
    image, sentence = next(iter(expected))
    assert call(monkeypatch, "predict", image, sentence, "--run", "data/rounds/0") == 0
    assert "predictions: 1 pair by data/rounds/0/model, 0 with a prior, 0 empty masks" in capsys.readouterr().out
    (line,) = lines_of(run / "predictions")
    mask = np.asarray(Image.open(run / "predictions" / line["mask"]))
    assert np.isin(mask, (0, 255)).all()
    assert alike(encode_rle(mask > 0), expected[image, sentence])
    assert (line["image"], line["sentence"], line["with_prior"]) == (image, sentence, False)
    assert (line["height"], line["width"], line["area_px"]) == (48, 64, (mask > 0).sum())
    assert segmentation_to_rle(line["segmentation"], 48, 64) == encode_rle(mask > 0)
    with Image.open(run / "predictions" / line["overlay"]) as overlay:
        assert max(overlay.size) == predict_files.OVERLAY_PX
        assert overlay.width / overlay.height == pytest.approx(64 / 48, rel=0.01)


def test_predict_uses_the_device_of_params_yaml_if_the_file_exists(run, monkeypatch, capsys):
    image, sentence = next(iter(evaluated(with_prior=False)))
    params = PARAMS.model_dump()
    params["train"]["engine"]["device"] = "mps"
    (run / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert call(monkeypatch, "predict", image, sentence) == 2
    assert "params.yaml: train.engine.device: got 'mps', but torch sees no Apple GPU" in capsys.readouterr().err
    (run / "params.yaml").unlink()
    assert call(monkeypatch, "predict", image, sentence) == 0


def test_predict_accepts_folders_pair_files_and_priors(run, monkeypatch):
    expected = evaluated(with_prior=True)
    rows = [{"image": f"../{image}", "sentence": sentence} for image, sentence in expected]
    (run / "mine").mkdir()
    (run / "mine" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(monkeypatch, "predict", "--pairs", "mine/pairs.jsonl", "--with-priors", "--polygons") == 0
    lines = lines_of(run / "predictions")
    assert [(line["image"], line["sentence"]) for line in lines] == list(expected)
    for line, rle in zip(lines, expected.values(), strict=True):
        assert not line["segmentation"] or alike(segmentation_to_rle(line["segmentation"], 48, 64), rle)
        assert (np.asarray(Image.open(run / "predictions" / line["mask"])) > 0).sum() == line["area_px"]
    assert any(line["with_prior"] for line in lines)

    (run / "photos").mkdir()
    for name, source in (("b.PNG", "000.png"), ("a.png", "001.png")):
        shutil.copy(run / "images" / source, run / "photos" / name)
    (run / "photos" / "notes.txt").write_text("not an image")
    (run / "photos" / "._a.png").write_bytes(b"\0\5\26\7\0")  # a metadata file of macOS
    assert call(monkeypatch, "predict", "photos", "images/002.png", "the dot", "--out", "other") == 0
    assert [line["image"] for line in lines_of(run / "other")] == ["photos/a.png", "photos/b.PNG", "images/002.png"]


def test_second_call_replaces_only_its_pictures(run, monkeypatch):
    assert call(monkeypatch, "predict", "images/000.png", "images/001.png", "the dot") == 0
    (run / "predictions" / "mine.png").write_text("mine")
    assert call(monkeypatch, "predict", "images/002.png", "a dot") == 0
    (line,) = lines_of(run / "predictions")
    names = {path.name for path in (run / "predictions").iterdir()}
    assert names == {"predictions.jsonl", "mine.png", line["mask"], line["overlay"]}


def test_notes_an_exif_rotated_photo(run, monkeypatch, capsys):
    image = Image.open("images/000.png").convert("RGB")
    exif = image.getexif()
    exif[EXIF_ORIENTATION] = 6
    image.save("turned.jpg", exif=exif)
    assert call(monkeypatch, "predict", "turned.jpg", "images/000.png", "the dot") == 0
    assert "note: an EXIF tag turns turned.jpg; pixels are used as stored" in capsys.readouterr().out
    assert [(line["height"], line["width"]) for line in lines_of(run / "predictions")] == [(48, 64)] * 2


BAD = {
    "nothing": ([], r"got 0 argument\(s\), expected IMAGE\.\.\. \"SENTENCE\""),
    "no sentence": (["images/000.png"], r"got 1 argument\(s\)"),
    "an image for a sentence": (["images/000.png", "images/001.png"], r"got 'images/001\.png', which is a file"),
    "a long sentence without words": (["images/000.png", "?" * 999], r"expected at least one word"),
    "no words": (["images/000.png", "?"], r"sentence: got '\?', expected at least one word"),
    "no such images": (["a.png", "images/000.png", "b.png", "dot"], r"2 problems:\n.*a\.png: not found\n.*b\.png: not"),
    "no image": (["params.yaml", "dot"], r"params\.yaml: corrupt, or not one of JPEG"),
    "an empty folder": (["empty", "dot"], r"empty: no image in this folder"),
    "no such file": (["--pairs", "pairs.jsonl"], r"pairs\.jsonl: not found"),
    "a folder for a file": (["--pairs", "images"], r"--pairs.*directory"),
    "both": (["images/000.png", "dot", "--pairs", "pairs.jsonl"], r"got both --pairs and arguments"),
    "no model": (["images/000.png", "dot", "--run", "images"], r"--run: got images, expected a folder with a model"),
    "a broken model": (["images/000.png", "dot", "--run", "broken"], r"broken/model: no usable model"),
    "a file for a folder": (["images/000.png", "dot", "--out", "params.yaml"], r"--out: .*params\.yaml is a file"),
    "another's index": (["images/000.png", "dot", "--out", "other"], r"other/predictions\.jsonl: not written by this"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_bad_input_with_one_message_and_no_file(run, monkeypatch, capsys, name):
    (run / "empty").mkdir()
    (run / "other").mkdir()
    (run / "other" / "predictions.jsonl").write_text('{"mine": 1}\n')
    shutil.copytree(MODEL_FOLDER, "broken/model")
    (run / "broken/model/model.safetensors").write_bytes(b"x")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words, message = BAD[name]
    assert call(monkeypatch, "predict", *words) == 2
    written = capsys.readouterr()
    assert not written.out
    assert "Traceback" not in written.err
    assert re.search(message, written.err, re.DOTALL)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_failed_call_leaves_the_folder_unchanged(run, monkeypatch):
    assert call(monkeypatch, "predict", "images/000.png", "the dot") == 0
    before = {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}
    monkeypatch.setattr(predict_files, "read_image", lambda path: (_ for _ in ()).throw(InputError(f"{path}: gone")))
    assert call(monkeypatch, "predict", "images/001.png", "the dot") == 2
    assert {path.name: path.read_bytes() for path in (run / "predictions").iterdir()} == before


CJK = "\u6f22\u5b57" * 40  # three bytes per character: 240 bytes, near the limit of a file name


def test_turns_long_names_in_any_script_into_file_names(run, monkeypatch):
    shutil.copy("images/000.png", f"{CJK}.png")
    assert call(monkeypatch, "predict", f"{CJK}.png", "\u8d64\u3044\u7bb1\u306e\u5de6\u306e" * 8) == 0
    (line,) = lines_of(run / "predictions")
    assert line["image"] == f"{CJK}.png"
    for kind in ("mask", "overlay"):
        assert len(line[kind].encode()) <= 143
        assert "\u6f22\u5b57" in line[kind]
        assert (run / "predictions" / line[kind]).is_file()


@pytest.mark.parametrize("text", [CJK, "e\u0301" * 99, "\U0001f436x" * 99, "a" * 99])
def test_cuts_names_between_characters(text):
    name = predict_files._slug(text)
    assert 0 < len(name.encode()) <= predict_files.NAME_BYTES
    assert "".join(re.findall(r"\w", text)).startswith(name.replace("-", ""))


def test_detects_an_invalid_file_name_before_computing(run, monkeypatch, capsys):
    monkeypatch.setattr(predict_files, "NAME_BYTES", 300)
    monkeypatch.setattr(Predictor, "masks", lambda *_, **__: pytest.fail("computed"))
    shutil.copy("images/000.png", f"{CJK}.png")
    assert call(monkeypatch, "predict", f"{CJK}.png", "the dot") == 2
    assert re.search(
        r"^error: --out: no file '0000_.*' can be written there: File name too long", capsys.readouterr().err
    )
    assert not (run / "predictions").exists()


def test_full_disk_keeps_masks_without_pictures(run, monkeypatch, capsys):
    expected = evaluated(with_prior=False)
    image, sentence = next(iter(expected))
    with monkeypatch.context() as full:
        full.setattr(
            predict_files, "save_mask", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert call(full, "predict", image, sentence) == 2
    said = "error: --out: predictions: the pictures cannot be written: No space left on device; predictions.jsonl holds"
    assert said in capsys.readouterr().err
    (line,) = lines_of(run / "predictions")
    assert segmentation_to_rle(line["segmentation"], 48, 64) == expected[image, sentence]
    assert [path.name for path in (run / "predictions").iterdir()] == ["predictions.jsonl"]
    assert call(monkeypatch, "predict", image, sentence) == 0  # with free space again
    assert len(list((run / "predictions").iterdir())) == 3


# --- live priors


def respond_by_sentence(body, _):
    """The response depends on the sentence and on greedy decoding; some responses break the format or fail."""
    sentence, moved = sentence_of(body), 100 if body["temperature"] else 0
    said = {"found": True, "target": "dot", "attributes": ["dark"], "relation": "", "anchor": "", "confidence": 0.7}
    match sentence:
        case "the refused dot":
            return 400, b"no"
        case "the garbled dot":
            return completion("I cannot say")
        case "no dot":
            return completion(json.dumps(said | {"found": False, "boxes": [], "point": None}))
        case "a point":
            return completion(json.dumps(said | {"boxes": [], "point": [400 + moved, 500]}))
    left = 50 * len(sentence)
    return completion(json.dumps(said | {"boxes": [[left, 200 + moved, left + 300, 600]], "point": None}))


SENTENCES = ("dot", "the dark dot", "a point", "no dot", "the garbled dot", "the refused dot")


@pytest.fixture
def live(run, monkeypatch):
    """A project with priors from a server, and user images with pairs that are not in the dataset."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Stub(respond=respond_by_sentence)) as stub:
        engine = PARAMS.priors.engine.model_copy(update={"server_url": stub.url, "server_retries": 0})
        live_params(run, engine=engine)
        rng = np.random.default_rng(0)
        (run / "own").mkdir()
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (40 + number, 70, 3), dtype=np.uint8)).save(f"own/{number}.png")
        rows = [{"image": f"{row % 2}.png", "sentence": sentence} for row, sentence in enumerate(SENTENCES)]
        (run / "own/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield stub


def live_params(run, **changes):
    """Write and return the parameters with the `openai` backend."""
    update = {"backend": "openai", "model": "qwen3-vl", "samples": 2, "retries": 1} | changes
    priors = PARAMS.priors.model_copy(update=update)
    params = PARAMS.model_copy(update={"priors": priors})
    (run / "params.yaml").write_text(yaml.safe_dump(params.model_dump()))
    return params


def through_the_pipeline(params, folder):
    """Pairs and masks of own/pairs.jsonl, processed like a dataset by the functions of the stages."""
    paths = records.IndexPaths(*(folder / f"{name}.parquet" for name in ("images", "refs", "objects", "masks")))
    index = read_jsonl(folder.parent / "own/pairs.jsonl")
    records.write_table(index.images, paths.images, records.IMAGES)
    records.write_table(index.refs, paths.refs, records.REFS)
    backend = make_backend(params.priors, paths)
    priors = interpret(query_table(backend, make_questions(paths, params.priors.samples)))
    frames = records.to_frame(index.refs), records.to_frame(index.images)
    records.write_table(priors, folder / "priors.parquet", records.PRIORS)
    proposals = make_proposals(priors, *frames, params.proposals)
    records.write_table(proposals, folder / "proposals.parquet", records.PROPOSALS)
    pairs = load_pairs(paths, None, folder / "priors.parquet", folder / "proposals.parquet", 24, 0.1)
    batches = BatchMaker(pairs, MODEL.image_size_px, params.proposals.flat_prob)
    return pairs, Predictor.from_pretrained(MODEL_FOLDER).masks(batches, 16, [True], "test")[0]


def test_live_priors_give_the_same_result_as_the_pipeline(live, run, monkeypatch, capsys):
    params = load_params()
    pairs, masks = through_the_pipeline(params, run / "ingested")
    assert call(monkeypatch, "predict", "--pairs", "own/pairs.jsonl", "--with-priors") == 0
    assert "predictions: 6 pairs by data/rounds/0/model, 3 with a prior, 0 empty masks" in capsys.readouterr().out
    lines = lines_of(run / "predictions")
    assert [line["with_prior"] for line in lines] == [True, True, True, False, False, False]
    rles = [segmentation_to_rle(line["segmentation"], line["height"], line["width"]) for line in lines]
    sizes = [(line["height"], line["width"]) for line in lines]
    assert all(alike(*both, *size) for *both, size in zip(rles, masks, sizes, strict=True))
    assert len(set(masks)) > 3  # something to compare

    requested = predict_files.pairs_of_file(run / "own/pairs.jsonl")
    backend = make_backend(params.priors, records.INDEX)
    prior_tables = predict_files.live_priors(requested, params, lambda questions: query_table(backend, questions))
    predicted = predict_files.predict_masks(Predictor.from_pretrained(MODEL_FOLDER), requested, prior_tables)
    assert all(alike(*both, *size) for *both, size in zip(predicted.rle, masks, sizes, strict=True))
    assert predicted.pairs.sentence == pairs.sentence
    assert predicted.pairs.prior_text == pairs.prior_text
    assert predicted.pairs.prior_text[1] == "dot dark"
    for name in ("hw", "box", "has_box", "proposal", "proposal_score"):
        np.testing.assert_array_equal(getattr(predicted.pairs, name), getattr(pairs, name), err_msg=name)
    assert np.isin(predicted.pairs.proposal_score > 0, [True, False]).all()

    without = predict_files.predict_masks(Predictor.from_pretrained(MODEL_FOLDER), requested, None)
    assert [alike(*both, *size) for *both, size in zip(masks, without.rle, sizes, strict=True)] == [
        False,
        False,
        False,
        False,
        True,
        True,
    ]


def test_queries_each_pair_once_and_independently_of_other_pairs(live, run):
    params = live_params(run, engine=load_params().priors.engine, samples=3)
    backend = make_backend(params.priors, records.INDEX)

    def prior_tables(*keys):
        files = inspect_images([run / f"own/{image}.png" for image, _ in keys], 1)
        requested = predict_files.PairList(files, [sentence for _, sentence in keys])
        return predict_files.live_priors(requested, params, lambda questions: query_table(backend, questions))

    twice = prior_tables((0, "dot"), (1, "dot"), (0, "dot"))
    assert len(live.bodies) == 2 * 3
    assert twice.sent_id[0] == twice.sent_id[2] != twice.sent_id[1]
    together = {json.dumps(body, sort_keys=True) for body in live.bodies}
    live.bodies.clear()
    prior_tables((1, "dot"))
    assert {json.dumps(body, sort_keys=True) for body in live.bodies} < together


def test_a_detector_finds_the_priors_of_new_images(live, run, monkeypatch):
    """The same priors as its backend gives to a dataset of these images, for every sample."""
    model = save_tiny_owlv2(run / "tiny-owl")
    params = live_params(run, backend="detector", model=str(model), precision="fp32")
    pairs, masks = through_the_pipeline(params, run / "ingested")
    assert pairs.has_box.all()
    assert call(monkeypatch, "predict", "--pairs", "own/pairs.jsonl", "--with-priors") == 0
    lines = lines_of(run / "predictions")
    assert all(line["with_prior"] for line in lines)
    for line, mask in zip(lines, masks, strict=True):
        size = line["height"], line["width"]
        assert alike(segmentation_to_rle(line["segmentation"], *size), mask, *size)
    assert not live.bodies


def test_recorded_backends_send_no_queries(live, run, monkeypatch):
    (run / "params.yaml").write_text(yaml.safe_dump(PARAMS.model_dump()))
    assert call(monkeypatch, "predict", "--pairs", "own/pairs.jsonl", "--with-priors") == 0
    assert not live.bodies
    assert not any(line["with_prior"] for line in lines_of(run / "predictions"))


@pytest.mark.parametrize("trouble", ["no server", "all refused"])
def test_unresponsive_server_gives_one_line_and_no_file(live, run, monkeypatch, capsys, trouble):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if trouble == "no server":
        engine = load_params().priors.engine.model_copy(update={"server_url": f"http://127.0.0.1:{port}/v1"})
        live_params(run, engine=engine)
    else:
        live.respond = lambda *_: (400, b"no")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert call(monkeypatch, "predict", "own/0.png", "own/1.png", "the dot", "--with-priors") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"error: (http.*no server listens there; .*priors\.engine\.server_url"
        r"|priors\.backend openai: every request failed, the first with 'HTTP 400')",
        line,
    )
    shutil.rmtree(run / ".scratch")  # keeps responses until a call succeeds
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


PROPOSALS = toy_params().proposals
CUT = {"renderer": "grabcut", "ring": 0.5, "core": 0.35}
BY_SAM = {"renderer": "sam", "model": "a"}


@pytest.mark.parametrize(
    ("trained", "recorded", "named"),
    [
        ({}, {}, None),
        ({"falloff": 0.3}, {}, "falloff: got 0.15, but the model was trained with 0.3"),
        (CUT, CUT, None),
        (CUT, CUT | {"core": 0.0}, "core: got 0.0, but the model was trained with 0.35"),
        (CUT, CUT | {"renderer": "box"}, "renderer: got box, but the model was trained with grabcut"),
        ({"ring": 0.5}, {"ring": 0.1}, None),  # boxes are not cut
        (CUT, CUT | {"model": "a"}, None),  # GrabCut needs no model
        (BY_SAM, BY_SAM | {"ring": 0.9}, None),
        (BY_SAM, BY_SAM | {"model": "b"}, "model: got b, but the model was trained with a"),
    ],
)
def test_recorded_proposals_must_match_the_rendering_of_the_model(tmp_path, monkeypatch, trained, recorded, named):
    monkeypatch.chdir(tmp_path)
    of_model = PROPOSALS.model_copy(update=trained)
    records.RENDERING_PATH.parent.mkdir(parents=True)
    rendered = PROPOSALS.model_copy(update=recorded)
    records.RENDERING_PATH.write_text(json.dumps({"proposals": rendered.model_dump()}))
    match = rf"rendering\.json: proposals\.{named}"
    with nullcontext() if named is None else pytest.raises(ConfigError, match=match):
        found = predict_files.with_trained_proposals(toy_params(proposals={"ring": "fit", "core": "fit"}), of_model)
        assert found.proposals == of_model


def test_live_priors_use_the_rendering_of_the_model():
    live = toy_params(priors={"backend": "openai"}, proposals={"renderer": "box"})
    of_model = PROPOSALS.model_copy(update=CUT)
    assert predict_files.with_trained_proposals(live, of_model).proposals == of_model


def test_a_projects_sam_takes_the_place_of_the_trained_one():
    by_sam = PROPOSALS.model_copy(update=BY_SAM)
    moved = toy_params(priors={"backend": "openai"}, proposals={"model": "models/moved"})
    assert predict_files.with_trained_proposals(moved, by_sam).proposals.model == "models/moved"
    unnamed = toy_params(priors={"backend": "openai"})
    assert predict_files.with_trained_proposals(unnamed, by_sam).proposals == by_sam


# --- two calls at once, and an index that was changed


def test_refuses_a_folder_that_another_call_is_writing(run, monkeypatch, capsys):
    """The pictures of the call that ends first would stay without an entry in the index of the other."""
    with predict_files.predictions_folder(run / "predictions"):
        assert call(monkeypatch, "predict", "images/000.png", "the dot") == 2
    assert re.fullmatch(
        r"error: --out: another process writes into .*/predictions; wait for it, or name another folder\n",
        capsys.readouterr().err,
    )
    assert call(monkeypatch, "predict", "images/000.png", "the dot") == 0
    (line,) = lines_of(run / "predictions")
    names = {"predictions.jsonl", line["mask"], line["overlay"]}
    assert {path.name for path in (run / "predictions").iterdir()} == names
    assert not list(run.glob(".predictions*"))


@pytest.mark.parametrize("name", ["..", ".", "mine.txt", "sub/0000_a_b.mask.png", "", 7, None, "0000_\0.mask.png"])
def test_removes_only_pictures_of_an_earlier_call(run, monkeypatch, name):
    out = run / "predictions"
    (out / "sub").mkdir(parents=True)
    for mine in ("mine.txt", "sub/0000_a_b.mask.png", "0007_a_b.mask.png"):
        (out / mine).write_text("mine")
    rows = [{"segmentation": {}, "mask": name, "overlay": "0007_a_b.mask.png"}]
    (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    is_text = isinstance(name, str)
    assert call(monkeypatch, "predict", "images/000.png", "the dot") == (0 if is_text else 2)
    assert (out / "mine.txt").read_text() == (out / "sub/0000_a_b.mask.png").read_text() == "mine"
    assert (out / "0007_a_b.mask.png").exists() != is_text
