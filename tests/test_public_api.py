"""What `import l2l_core` offers: the names, their examples, and one call from image to mask."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pairs import toy_network, toy_pairs

import l2l_core as l2l
from l2l_core.core.masks import decode_rle
from l2l_core.data.pairs import BatchMaker
from l2l_core.model.batch_predictor import bare_pairs

ROOT = Path(__file__).parents[1]
TYPES = {"ArtifactError", "ConfigError", "Index", "InputError", "L2LError", "Params", "Prediction"}
PUBLIC = TYPES | {
    "Predictor",
    "decode_rle",
    "encode_rle",
    "load_dataset",
    "load_params",
    "parse_response",
    "render_box",
    "render_point",
    "segmentation_scores",
    "to_rgb",
}
WITH_EXAMPLES = sorted(PUBLIC - TYPES)


def test_public_api_exports_the_documented_names() -> None:
    assert set(l2l.__all__) == PUBLIC
    assert set(dir(l2l)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(l2l, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Predicter'"):
        l2l.Predicter  # noqa: B018


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((ROOT / "l2l_core/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == {(name, l2l._HOMES[name]) for name in PUBLIC}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_the_docstrings_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    public = getattr(l2l, name)
    tests = doctest.DocTestFinder(recurse=False).find(public, name, globs={"np": np, name: public})
    assert sum(len(test.examples) for test in tests) > 0
    runner = doctest.DocTestRunner()
    for test in tests:
        assert runner.run(test).failed == 0


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, l2l_core; print(sorted({'torch', 'pandas', 'numpy', 'cv2', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- from image to mask


@pytest.fixture
def predictor(tmp_path: Path) -> l2l.Predictor:
    pairs, _ = toy_pairs(tmp_path / "toy")
    network = toy_network(pairs)
    with torch.no_grad():  # a new network gives its proposal, which is the same everywhere
        for parameter in network.decoder.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    settings = l2l.load_params(ROOT / "params.yaml").proposals.model_copy(update={"ring": 0.1, "core": 0.2})
    network.save(tmp_path / "model", settings)
    return l2l.Predictor.from_pretrained(tmp_path / "model", device="cpu")


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_a_path_a_pillow_image_and_an_array_give_the_same_prediction(predictor, tmp_path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    found = [predictor(image, "the red circle") for image in (tmp_path / "photo.png", Image.fromarray(PIXELS), PIXELS)]
    for other in found[1:]:
        assert np.array_equal(other.prob, found[0].prob)
    assert found[0].prob.shape == found[0].mask.shape == (30, 40)
    assert found[0].prob.dtype == np.float32
    assert np.array_equal(found[0].mask, found[0].prob > 0.5)
    assert 0 < found[0].mask.mean() < 1


def test_the_mask_is_the_one_that_stages_compute(predictor, tmp_path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    pairs = bare_pairs([str(tmp_path / "photo.png")], [(30, 40)], ["a blue star"], predictor.network.proposals.size_px)
    batches = BatchMaker(pairs, predictor.network.params.image_size_px, predictor.network.proposals.flat_prob)
    ((counts,),) = predictor.masks(batches, 1, [False], "test", fill=False)
    assert np.array_equal(predictor(PIXELS, "a blue star").mask, decode_rle(counts, 30, 40))


def test_several_sentences_share_an_image(predictor) -> None:
    sentences = [f"object {number}" for number in range(20)]  # more than are computed at once
    together = predictor(PIXELS, sentences)
    assert len(together) == 20
    for sentence, found in zip(sentences[:3], together, strict=False):
        np.testing.assert_allclose(found.prob, predictor(PIXELS, sentence).prob, atol=1e-4)


def test_the_score_is_the_mean_probability_inside_the_mask() -> None:
    prob = np.array([[0.9, 0.7], [0.2, 0.5]], np.float32)
    assert l2l.Prediction(prob > 0.5, prob).score == pytest.approx(0.8)
    assert l2l.Prediction(np.zeros((2, 2), bool), prob).score == 0.0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no_such_photo.jpg", "no_such_photo.jpg: image not found"),
        (np.zeros((4, 4, 3), np.float32), r"image: got an array \[4, 4, 3\] float32, expected a path"),
        (np.zeros((4, 4, 4), np.uint8), r"image: got an array \[4, 4, 4\] uint8"),
        (Image.new("F", (4, 4)), "image: .*Pillow's mode F"),
        (None, "image: got None"),
    ],
)
def test_an_unusable_image_is_named(predictor, image, message) -> None:
    with pytest.raises(l2l.L2LError, match=message):
        predictor(image, "the red circle")


@pytest.mark.parametrize("sentence", ["", " ", [], ["a", ""]])
def test_an_unusable_sentence_is_named(predictor, sentence) -> None:
    with pytest.raises(l2l.L2LError, match=r"sentence: got .*expected a sentence"):
        predictor(PIXELS, sentence)
