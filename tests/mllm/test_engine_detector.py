"""TransformersDetector with tiny random models of every family; the library's documented route is the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prior_tables import ROOT, prior_params
from tiny_detectors import SAVE, needs_torchvision, save_tiny_sam3_video
from tiny_llava import save_tiny_llava
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, Sam3Model, Sam3Processor

from l2l_core.core.masks import decode_rle
from l2l_core.errors import ConfigError
from l2l_core.mllm import engine_detector
from l2l_core.mllm.detector import Detection, DetectionRequest
from l2l_core.mllm.engine_detector import TransformersDetector

FAMILIES = [pytest.param(name, marks=needs_torchvision if name == "sam3" else ()) for name in SAVE]
SENTENCES = ("the red cup", "dog", "blue dog left")
SIZES = {"wide": (44, 90), "tall": (97, 40)}  # height, width
PIXEL, SCORE = 0.02, 1e-4
"""Tolerances: boxes are rounded to 0.01 px, and other batches change the order of float sums."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in saved:
            saved[name] = SAVE[name](tmp_path_factory.mktemp("models") / name)
        return saved[name]

    return save


def make(folder: Path, **changes: object) -> TransformersDetector:
    settings: dict[str, Any] = {"backend": "detector", "model": str(folder), "precision": "fp32"}
    return TransformersDetector(prior_params(engine={"device": "cpu"}, **(settings | changes)))


def photo(seed: int, hw: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)
    pixels[hw[0] // 4 : hw[0] // 2, : hw[1] // 3] = (200, 30, 30 * seed)
    return Image.fromarray(pixels)


def detect(detector: TransformersDetector, image: Image.Image, sentence: str, count: int = 1) -> list[Detection]:
    (found,) = detector.detect([DetectionRequest(image, sentence, count)])
    return found


@torch.inference_mode()
def by_the_library(folder: Path, image: Image.Image, sentence: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """One pair as in the model's documentation -> the model's outputs, and its post-processed boxes in pixels."""
    size = [(image.height, image.width)]
    if "sam3" in folder.name:
        processor, model = Sam3Processor.from_pretrained(folder), Sam3Model.from_pretrained(folder)
        outputs = model(**processor(images=image, text=sentence, return_tensors="pt"))
        results = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=size)
    else:
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
        outputs = model(**processor(images=image, text=[[sentence]], return_tensors="pt"))
        results = processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=size)
    return outputs, results[0]


def best_visible(boxes: torch.Tensor, scores: torch.Tensor, hw: tuple[int, int]) -> tuple[int, list[float]]:
    """The row of the best box with a pixel inside the image, and its part inside, found by a plain loop."""
    for row in scores.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[row].tolist()
        inside = [max(x1, 0.0), max(y1, 0.0), min(x2, float(hw[1])), min(y2, float(hw[0]))]
        if inside[2] - inside[0] >= 1 and inside[3] - inside[1] >= 1:
            return row, inside
    raise AssertionError("no box in the image")


# --- against the library


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_box_and_its_score_are_those_of_the_library(
    folder_of: Callable[[str], Path], name: str, shape: str
) -> None:
    folder, hw = folder_of(name), SIZES[shape]
    detector = make(folder)
    for number, sentence in enumerate(SENTENCES):
        image = photo(number, hw)
        _, result = by_the_library(folder, image, sentence)
        row, inside = best_visible(result["boxes"], result["scores"], hw)
        (found,) = detect(detector, image, sentence)
        assert found.box == pytest.approx(inside, abs=PIXEL)
        assert found.score == pytest.approx(result["scores"][row].item(), abs=SCORE)
        if name == "sam3":
            assert found.mask is not None
            assert (decode_rle(found.mask, *hw) != result["masks"][row].numpy()).mean() < 1e-3
        else:
            assert found.mask is None


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_box_is_in_pixels_of_the_image_and_not_of_the_padded_input(
    folder_of: Callable[[str], Path], name: str, shape: str
) -> None:
    """By hand from the model's fractions: of the longer side for OWLv2, which pads images to squares at the right or at
    the bottom; of width and height for the others."""
    folder, (height, width) = folder_of(name), SIZES[shape]
    outputs, result = by_the_library(folder, photo(0, (height, width)), "the red cup")
    row, _ = best_visible(result["boxes"], result["scores"], (height, width))
    fractions = outputs.pred_boxes[0, row].tolist()
    if name != "sam3":  # center and size
        x, y, box_width, box_height = fractions
        fractions = [x - box_width / 2, y - box_height / 2, x + box_width / 2, y + box_height / 2]
    across, down = (max(height, width),) * 2 if name == "owlv2" else (width, height)
    expected = np.clip(fractions * np.array([across, down] * 2), 0, [width, height] * 2)
    (found,) = detect(make(folder), photo(0, (height, width)), "the red cup")
    assert found.box == pytest.approx(expected.tolist(), abs=PIXEL)


# --- batches


@pytest.mark.parametrize("name", FAMILIES)
def test_a_result_does_not_depend_on_its_batch(folder_of: Callable[[str], Path], name: str) -> None:
    detector = make(folder_of(name))
    images = [photo(number, SIZES["wide"]) for number in range(2)]
    pairs = [(0, SENTENCES[0]), (0, SENTENCES[1]), (0, SENTENCES[2]), (1, SENTENCES[0]), (1, SENTENCES[2])]
    requests = [DetectionRequest(images[number], sentence, 2) for number, sentence in pairs]
    together = detector.detect(requests)
    for request, found in zip(requests, together, strict=True):
        alone = detect(detector, request.image, request.sentence, 2)
        assert len(alone) == len(found) == 2
        for one, other in zip(alone, found, strict=True):
            assert one.box == pytest.approx(other.box, abs=PIXEL)
            assert one.score == pytest.approx(other.score, abs=SCORE)
            assert (one.mask is None) == (other.mask is None)
    assert len({found[0].score for found in together}) == 5  # image and sentence matter
    assert len({found[0].box for found in together}) >= 2


@pytest.mark.parametrize("name", [param for param in FAMILIES if "dino" not in str(param.values[0])])
def test_an_image_is_encoded_once_for_all_its_sentences(folder_of: Callable[[str], Path], name: str) -> None:
    detector = make(folder_of(name))
    model: Any = detector._model
    vision = model.vision_encoder if name == "sam3" else getattr(model, name).vision_model
    encoded: list[int] = []
    vision.register_forward_pre_hook(
        lambda _, given, named: encoded.append(len((*given, *named.values())[0])), with_kwargs=True
    )
    images = [photo(number, SIZES["wide"]) for number in range(2)]
    detector.detect([DetectionRequest(image, sentence, 1) for image in images for sentence in SENTENCES])
    assert encoded == [2]


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_moves_a_box_by_less_than_a_pixel(folder_of: Callable[[str], Path], name: str) -> None:
    """Weights are stored in fp32; a near tie may change the order of the boxes."""
    plain, quick = make(folder_of(name)), make(folder_of(name), precision="bf16")
    assert (plain.precision, quick.precision) == ("fp32", "bf16")
    (best,) = detect(plain, photo(0, SIZES["wide"]), "the red cup")
    found = detect(quick, photo(0, SIZES["wide"]), "the red cup", 16)
    nearest = min(found, key=lambda other: float(np.abs(np.subtract(other.box, best.box)).max()))
    assert nearest.box == pytest.approx(best.box, abs=1.0)
    assert nearest.score == pytest.approx(best.score, abs=0.02)


# --- sentences


@pytest.mark.parametrize("name", FAMILIES)
def test_words_beyond_the_models_limit_are_cut_off(folder_of: Callable[[str], Path], name: str) -> None:
    detector, image = make(folder_of(name)), photo(0, SIZES["wide"])
    long = " ".join(["a"] * 70)
    assert detect(detector, image, f"{long} dog") == detect(detector, image, f"{long} cup")
    assert detect(detector, image, "a dog") != detect(detector, image, "a cup")


@pytest.mark.parametrize("name", ["grounding-dino", "mm-grounding-dino"])
def test_stops_do_not_divide_a_sentence_into_phrases(folder_of: Callable[[str], Path], name: str) -> None:
    """Grounding DINO ends a phrase at each full stop and question mark, and reads lower case."""
    detector, image = make(folder_of(name)), photo(0, SIZES["wide"])
    plain = detect(detector, image, "the red cup left")
    for same in ("the red cup left.", "The red cup. Left?", "the red cup... left"):
        assert detect(detector, image, same) == plain
    assert detect(detector, image, "the red cup") != plain


# --- loading


@needs_torchvision
def test_sam3_loads_from_the_published_layout_of_detector_and_tracker(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """facebook/sam3 is a Sam3VideoModel, whose detector is the Sam3Model."""
    whole = save_tiny_sam3_video(tmp_path / "sam3_video", folder_of("sam3"))
    assert json.loads((whole / "config.json").read_text())["model_type"] == "sam3_video"
    image = photo(0, SIZES["wide"])
    expected = detect(make(folder_of("sam3")), image, "the red cup", 3)
    assert detect(make(whole), image, "the red cup", 3) == expected


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def cut_off(folder: Path) -> None:
    """As an interrupted download leaves it."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def retype(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "from-tomorrow"}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("model.safetensors"), "model.safetensors"),
        (without("processor_config.json"), "processor"),
        (without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        (without("config.json"), "config.json"),
        (retype, "from-tomorrow"),
        (cut_off, "incomplete"),
    ],
    ids=["weights", "processor", "tokenizer", "configuration", "unknown type", "damaged weights"],
)
@pytest.mark.parametrize("name", ["grounding-dino", "owlv2"])
def test_an_incomplete_folder_is_reported_in_one_line(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], words: str
) -> None:
    folder = SAVE[name](tmp_path / "mine")
    spoil(folder)
    with pytest.raises(ConfigError, match=r"priors\.model: got '.*mine', expected a hub id .* a detector: ") as caught:
        make(folder)
    assert "\n" not in str(caught.value)
    assert words in str(caught.value).partition("a detector: ")[2]


def test_a_missing_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"priors\.model: got '.*nowhere', expected a hub id"):
        make(tmp_path / "nowhere")


def test_a_model_that_is_no_detector_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "tiny-llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"got '.*tiny-llava', a model of type 'llava', expected a detector of type gr"
    ):
        make(folder)


def test_sam3_without_torchvision_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sam3_video"}')
    monkeypatch.setattr(engine_detector, "is_torchvision_available", lambda: False)
    with pytest.raises(ConfigError, match=r"needs torchvision: pip install -e '\.\[detector\]'"):
        make(tmp_path)


def test_scores_that_are_not_numbers_are_an_error(folder_of: Callable[[str], Path]) -> None:
    """Not silently the next best box: masks are found by the row of their box."""
    detector = make(folder_of("owlv2"))
    with torch.no_grad():
        detector._model.class_head.dense0.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        detect(detector, photo(0, SIZES["wide"]), "the red cup")


def test_owlv2_works_beside_the_networks_encoders(folder_of: Callable[[str], Path]) -> None:
    """They import transformers with scipy hidden, which OWLv2's image processor needs without torchvision."""
    code = """
import l2l_core.model.encoders
import sys
from PIL import Image
from l2l_core.config import load_params
from l2l_core.mllm.detector import DetectionRequest
from l2l_core.mllm.engine_detector import TransformersDetector
changes = ["priors.backend=detector", "priors.model=" + sys.argv[1], "priors.precision=fp32"]
detector = TransformersDetector(load_params("params.yaml", overrides=changes).priors)
print(len(detector.detect([DetectionRequest(Image.new("RGB", (60, 40)), "dog", 1)])[0]), "box")
"""
    command: Sequence[object] = (sys.executable, "-c", code, folder_of("owlv2"))
    done = subprocess.run(list(map(str, command)), cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 box" in done.stdout
