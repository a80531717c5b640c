"""The public Predictor: loading a model, and masks with and without priors as the pipeline computes them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_sam import save_tiny_sam
from toy_pairs import SIZE_PX, TRAIN, rows_of, stirred_network, toy_network, toy_pairs, toy_params

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.data.pairs import BatchMaker, with_priors
from l2l_core.errors import ArtifactError, ConfigError, InputError
from l2l_core.inference.predictor import Predictor
from l2l_core.model.batch_predictor import BatchPredictor, bare_pairs
from l2l_core.priors.proposals import make_proposals

ROOT = Path(__file__).resolve().parents[2]
PROPOSALS = toy_params().proposals
SENTENCES = ["the square on the left", "the square on the right", "the dark corner"]


@pytest.fixture
def pairs(tmp_path):
    return toy_pairs(tmp_path / "images", 5)[0]


def loaded(pairs, folder, **changes) -> Predictor:
    """A saved and loaded network whose proposals were rendered with other parameters."""
    network = stirred_network(pairs)
    network.proposals, network.precision = PROPOSALS.model_copy(update={"size_px": 16, **changes}), "fp32"
    network.save(folder / "model")
    return Predictor.from_pretrained(folder / "model", device="cpu")


# --- priors


def pipeline_masks(predictor: Predictor, path: str, hw: tuple[int, int], priors: list[dict[str, object]]) -> np.ndarray:
    """Masks [N, H, W] of SENTENCES from tables of priors and proposals, by the functions of the stages."""
    proposals = predictor.network.known_proposals()
    rows = [{"sent_id": row, "sample_index": 0, **prior} for row, prior in enumerate(priors)]
    table = records.make_table(rows, records.PRIORS)
    refs = pd.DataFrame({"sent_id": range(len(rows)), "image_id": 1})
    images = pd.DataFrame([{"image_id": 1, "file_name": path, "height": hw[0], "width": hw[1]}])
    rendered = make_proposals(table, refs, images, proposals)
    bare = bare_pairs([path] * len(rows), [hw] * len(rows), SENTENCES, proposals.size_px)
    batches = BatchMaker(with_priors(bare, table, rendered, proposals.flat_prob), SIZE_PX, proposals.flat_prob)
    (found,) = predictor.masks(batches, len(rows), [True], "test")
    return np.stack([decode_rle(mask, *hw) for mask in found])


@pytest.mark.parametrize("renderer", ["box", "grabcut", "sam"])
def test_a_prior_gives_the_mask_that_the_pipeline_computes_with_it(pairs, tmp_path, renderer):
    """A box, a mask and no prior, in one call and one by one."""
    changes = {"model": str(save_tiny_sam(tmp_path / "sam", "sam"))} if renderer == "sam" else {}
    predictor = loaded(pairs, tmp_path, renderer=renderer, **changes)
    path, (height, width) = pairs.image_path[0], pairs.hw[0].tolist()
    box, mask = [4.3, 8.0, 22.0, 28.7], np.zeros((height, width), dtype=bool)
    mask[5:20, 30:48] = True
    tables = [
        {"bbox": box, "score": 0.75},
        {"bbox": [30.0, 5.0, 48.0, 20.0], "mask": encode_rle(mask), "score": 0.5},
        {},
    ]
    expected = pipeline_masks(predictor, path, (height, width), tables)
    together = predictor(path, SENTENCES, prior=[box, mask, None], prior_score=[0.75, 0.5, 1.0])
    assert len({found.mask.tobytes() for found in together}) == 3
    for sentence, prior, score, found, wanted in zip(
        SENTENCES, [box, mask, None], [0.75, 0.5, 1.0], together, expected, strict=True
    ):
        assert 0.02 < wanted.mean() < 0.98
        assert (found.mask != wanted).mean() < 1e-3  # a logit at 0 may round to the other side
        alone = predictor(path, sentence, prior=prior, prior_score=score)
        np.testing.assert_allclose(alone.prob, found.prob, atol=1e-4)


def test_the_score_of_a_prior_changes_the_prediction(pairs, tmp_path):
    predictor = loaded(pairs, tmp_path)
    sure, unsure = (predictor(pairs.image_path[0], "it", prior=[4, 8, 22, 28], prior_score=score) for score in (1, 0))
    assert not np.allclose(sure.prob, unsure.prob, atol=1e-3)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([4, 8, 22], r"prior: got \[4, 8, 22\], expected a box .* x2 <= 60 and y1 < y2 <= 40"),
        ([4, 8, 4, 28], "expected a box"),
        ([4, 8, 61, 28], "expected a box"),
        ([4, 8, float("nan"), 28], "expected a box"),
        ("left", "prior: got 'left', expected a box"),
        (np.ones((40, 50), dtype=bool), r"prior: got an array \[40, 50\] bool, .* or a mask \[40, 60\] of bool"),
        (np.zeros((40, 60), dtype=bool), "with some foreground"),
    ],
)
def test_an_unusable_prior_is_named(pairs, tmp_path, prior, message):
    predictor = loaded(pairs, tmp_path)
    with pytest.raises(InputError, match=message):
        predictor(pairs.image_path[0], "the square", prior=prior)


def test_a_model_trained_without_priors_refuses_one(pairs, tmp_path):
    network = stirred_network(pairs)
    network.proposals, network.takes_priors = PROPOSALS, False
    network.save(tmp_path / "model")
    predictor = Predictor.from_pretrained(tmp_path / "model", device="cpu")
    bare = predictor(pairs.image_path[0], "it")
    (none,) = predictor(pairs.image_path[0], ["it"], prior=[None])
    np.testing.assert_array_equal(bare.mask, none.mask)
    with pytest.raises(InputError, match="prior: this model was trained without priors"):
        predictor(pairs.image_path[0], "it", prior=[4, 8, 22, 28])


def test_refuses_another_number_of_priors_or_scores(pairs, tmp_path):
    predictor, box = loaded(pairs, tmp_path), [4, 8, 22, 28]
    with pytest.raises(InputError, match="prior: got 2, expected one for each of 3 sentences"):
        predictor(pairs.image_path[0], SENTENCES, prior=[box, None])
    for scores in (1.5, [0.5, 0.5], None):
        with pytest.raises(InputError, match=r"prior_score: got .*, expected a number from 0 to 1"):
            predictor(pairs.image_path[0], SENTENCES, prior=[box, None, box], prior_score=scores)


# --- cost


def test_a_call_encodes_its_image_once(pairs, tmp_path, monkeypatch):
    predictor, encoded = loaded(pairs, tmp_path), []
    encode = predictor.network.encode_image
    monkeypatch.setattr(predictor.network, "encode_image", lambda image: encoded.append(len(image)) or encode(image))
    found = predictor(pairs.image_path[0], SENTENCES * 7)  # more than are decoded at once
    assert encoded == [1]
    assert [one.mask.shape for one in found] == [tuple(pairs.hw[0])] * 21


# --- models loaded from a folder


def test_loads_a_model_in_another_process_without_params_file(pairs, tmp_path):
    """The process runs in a folder without params.yaml, and two proposal settings of the model differ from the
    defaults."""
    network = stirred_network(pairs)
    network.proposals, network.precision = PROPOSALS.model_copy(update={"flat_prob": 0.48, "size_px": 16}), "fp32"
    network.save(tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import sys, numpy as np; from l2l_core.inference.predictor import Predictor; "
        "np.save('mask.npy', Predictor.from_pretrained(sys.argv[1])(sys.argv[2], sys.argv[3]).mask)"
    )
    command = [sys.executable, "-c", code, tmp_path / "model", pairs.image_path[1], pairs.sentence[1]]
    subprocess.run(command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    alone = BatchMaker(pairs.take(rows_of(1)), SIZE_PX, 0.48)
    ((mask,),) = BatchPredictor.of(network, TRAIN).masks(alone, 1, [False], "test")
    found = np.load(elsewhere / "mask.npy")
    assert 0.02 < found.mean() < 0.98
    assert (found != decode_rle(mask, *found.shape)).mean() < 1e-3


def test_refuses_a_model_without_training_settings_and_says_what_to_do(pairs, tmp_path):
    toy_network(pairs).save(tmp_path / "model")
    with pytest.raises(
        ArtifactError, match=r"model: config.json of the model lacks `proposals`.*train again"
    ) as caught:
        Predictor.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)
    BatchPredictor.from_run(tmp_path / "model", TRAIN)  # stages pass their own settings


def test_loads_a_model_on_the_given_device(pairs, tmp_path, monkeypatch):
    """Here `auto` would select a GPU."""
    network = toy_network(pairs)
    network.proposals = PROPOSALS
    network.save(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Predictor.from_pretrained(tmp_path / "model", device="cpu").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="got 'cuda', but torch sees no CUDA device"):
        Predictor.from_pretrained(tmp_path / "model", device="cuda")


def test_warning_about_emulated_precision_names_the_model_config(pairs, tmp_path, monkeypatch, capsys):
    network = toy_network(pairs)
    network.proposals, network.precision_setting = PROPOSALS, "bf16"
    network.save(tmp_path / "model")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    Predictor.from_pretrained(tmp_path / "model", device="cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'model/config.json'}: precision_setting: got 'bf16', which this cpu")
