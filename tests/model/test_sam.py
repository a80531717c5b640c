"""Prompts, masks and their resizing, against each family's own processor and model on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sam import FAMILIES, IMAGE_PX, WITHOUT_TORCHVISION, require, save_tiny_sam

from l2l_core.errors import ConfigError
from l2l_core.model import sam as sam_module
from l2l_core.model.sam import LOGIT_LIMIT, Masks, Prompts, Sam, stability, without_duplicates

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fp32_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam_module, "resolve_precision", lambda setting, device: "fp32")


SIZES = ((50, 80), (96, 40), (64, 64))  # wider, higher, and as the models' input
BOXES = np.array([[5.0, 4.0, 30.0, 36.0], [10.5, 0.0, 40.0, 39.5], [0.0, 20.0, 20.0, 40.0]])
POINTS = np.array([[12.0, 20.5], [25.0, 30.0], [3.0, 38.0]])
NO_BOXES, NO_POINTS = np.full((3, 4), np.nan), np.full((3, 2), np.nan)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A loaded tiny model, with the library's own model and processor."""
    require(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam_module, "resolve_precision", lambda setting, device: "fp32")
        if request.param == "edgetam":  # the default of its configuration is looked up on the hub whenever one is made
            from transformers import TimmWrapperConfig
            from transformers.models.edgetam import configuration_edgetam

            default = SimpleNamespace(from_pretrained=lambda *_, **__: TimmWrapperConfig(architecture="test_resnet"))
            patch.setattr(configuration_edgetam, "AutoConfig", default)
        folder = save_tiny_sam(tmp_path_factory.mktemp(request.param), request.param)
        sam = Sam(str(folder), CPU)
        yield SimpleNamespace(sam=sam, model=sam._model, processor=sam._processor, folder=folder, family=request.param)


def library_masks(tiny: Any, image: np.ndarray, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Low-resolution logits [N, K, L, L], predicted IoUs [N, K] and the processor's inputs, without any of our code."""
    inputs = tiny.processor(images=[image], return_tensors="pt", **prompts)
    given = {name: inputs[name] for name in ("input_boxes", "input_points", "input_labels") if name in inputs}
    given = {name: value if name == "input_labels" else value.float() for name, value in given.items()}
    with torch.inference_mode():
        found = tiny.model(pixel_values=inputs["pixel_values"], multimask_output=True, **given)
    return found.pred_masks[0], found.iou_scores[0], inputs


def library_prompts(kind: str) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if "box" in kind:
        parts["input_boxes"] = [BOXES.tolist()]
    if "point" in kind:
        parts |= {"input_points": [POINTS[:, None].tolist()], "input_labels": [[[1]] * len(POINTS)]}
    return parts


def own_prompts(kind: str) -> Prompts:
    return Prompts(BOXES if "box" in kind else NO_BOXES, POINTS if "point" in kind else NO_POINTS)


@pytest.mark.parametrize("kind", ["box", "point", "box and point"])
@pytest.mark.parametrize("hw", SIZES)
def test_takes_the_mask_of_the_highest_predicted_iou(tiny: Any, hw: tuple[int, int], kind: str) -> None:
    """One of three masks for each prompt, equal to what the library computes from pixels and prompts at once."""
    image = photo(*hw)
    logits, scores, _ = library_masks(tiny, image, **library_prompts(kind))
    found = tiny.sam.segment(tiny.sam.encode([image])[0], own_prompts(kind))
    assert scores.shape == (3, 3)
    for row in range(3):
        best = max(range(3), key=scores[row].tolist().__getitem__)
        torch.testing.assert_close(found.logits[row], logits[row, best], rtol=1e-3, atol=1e-3)
        assert found.predicted_iou[row] == pytest.approx(min(1, max(0, float(scores[row, best]))), abs=1e-4)


@pytest.mark.parametrize("hw", SIZES)
def test_masks_at_the_image_size_are_those_of_the_processor(tiny: Any, hw: tuple[int, int]) -> None:
    image = photo(*hw)
    logits, _, inputs = library_masks(tiny, image, **library_prompts("box"))
    padding = {"reshaped_input_sizes": inputs["reshaped_input_sizes"]} if "reshaped_input_sizes" in inputs else {}
    (expected,) = tiny.processor.post_process_masks([logits], original_sizes=inputs["original_sizes"], **padding)
    encoded = tiny.sam.encode([image])[0]
    for mask in range(3):
        own = tiny.sam.resize(logits[:, mask], encoded, *hw)
        assert own.shape == (3, *hw)
        torch.testing.assert_close(own > 0, expected[:, mask])


@pytest.mark.parametrize("hw", SIZES)
def test_probabilities_are_means_over_the_cells_of_the_image(tiny: Any, hw: tuple[int, int]) -> None:
    """The processor's probabilities on 24 x 24 cells, more than the masks' own 16, averaged two by two."""
    image, size = photo(*hw), 12
    logits, _, inputs = library_masks(tiny, image, **library_prompts("box"))
    logits = 4 * logits / logits.std()  # some certain, some not
    padding = {"reshaped_input_sizes": inputs["reshaped_input_sizes"]} if "reshaped_input_sizes" in inputs else {}
    sizes = [(2 * size, 2 * size)]
    (fine,) = tiny.processor.post_process_masks([logits[:, :1]], original_sizes=sizes, binarize=False, **padding)
    expected = 1 / (1 + np.exp(-fine[:, 0].numpy().astype(np.float64)))
    expected = expected.reshape(3, size, 2, size, 2).mean((2, 4))
    own = tiny.sam.probabilities(logits[:, 0], tiny.sam.encode([image])[0], size)
    assert own.dtype == np.float32
    assert own.std() > 0.05
    np.testing.assert_allclose(own, expected, atol=1e-5)


def test_many_images_are_encoded_like_one(tiny: Any) -> None:
    """Six images of different sizes fill more than one batch."""
    images = [photo(*SIZES[number % 3], seed=number) for number in range(6)]
    together = tiny.sam.encode(images)
    for image, encoded in zip(images, together, strict=True):
        (alone,) = tiny.sam.encode([image])
        assert encoded.hw == image.shape[:2]
        first, second = (tiny.sam.segment(one, own_prompts("box")) for one in (encoded, alone))
        torch.testing.assert_close(first.logits, second.logits, rtol=1e-3, atol=1e-3)


def test_prompts_of_different_kinds_do_not_influence_each_other(tiny: Any) -> None:
    """Box, point, and box with point in one call give the masks of three calls."""
    (encoded,) = tiny.sam.encode([photo(50, 80)])
    mixed = Prompts(np.stack([BOXES[0], NO_BOXES[1], BOXES[2]]), np.stack([NO_POINTS[0], POINTS[1], POINTS[2]]))
    found = tiny.sam.segment(encoded, mixed)
    for row in range(3):
        alone = tiny.sam.segment(encoded, mixed.take(np.array([row])))
        torch.testing.assert_close(found.logits[row], alone.logits[0], rtol=1e-3, atol=1e-3)
        assert found.predicted_iou[row] == pytest.approx(alone.predicted_iou[0], abs=1e-4)


def test_a_rough_mask_lies_on_the_image_and_not_on_its_padding(tiny: Any) -> None:
    """A mask of the image's left half covers the left half of the model's input, as far as the image reaches."""
    hw = (40, 80)
    (encoded,) = tiny.sam.encode([photo(*hw)])
    rough = np.full((1, 32, 32), -30.0, np.float32)
    rough[..., :16] = 30.0
    cells = tiny.sam._mask_input(encoded, torch.from_numpy(rough))[0, 0]
    assert cells.shape == (16, 16)
    is_padded = tiny.family in WITHOUT_TORCHVISION  # SAM pads images to squares, its successors stretch them
    expected = torch.full((16, 16), -LOGIT_LIMIT)
    expected[: 8 if is_padded else 16, :8] = LOGIT_LIMIT
    torch.testing.assert_close(cells[:, [0, 5, 10, 15]], expected[:, [0, 5, 10, 15]])


def test_a_rough_mask_changes_the_result(tiny: Any) -> None:
    """Two different masks with one box; each equals the library's own result for that mask."""
    image, rough = photo(64, 64), np.random.default_rng(1).normal(0, 3, (3, 16, 16)).astype(np.float32)
    (encoded,) = tiny.sam.encode([image])
    boxes = np.repeat(BOXES[:1], 3, axis=0)
    found = tiny.sam.segment(encoded, Prompts(boxes, NO_POINTS, rough))
    assert not torch.allclose(found.logits[0], found.logits[1], atol=1e-2)
    for row in range(3):
        inputs = tiny.processor(images=[image], input_boxes=[boxes[:1].tolist()], return_tensors="pt")
        with torch.inference_mode():
            one = tiny.model(
                pixel_values=inputs["pixel_values"],
                input_boxes=inputs["input_boxes"].float(),
                input_masks=torch.from_numpy(rough[row][None, None]),
                multimask_output=True,
            )
        best = int(one.iou_scores[0, 0].argmax())
        torch.testing.assert_close(found.logits[row], one.pred_masks[0, 0, best], rtol=1e-3, atol=1e-3)


# --- real configurations, without weights


@pytest.mark.parametrize(
    ("config", "model", "sizes"),
    [
        ("SamConfig", "SamModel", [(256, 64, 64)]),
        ("SamHQConfig", "SamHQModel", [(256, 64, 64)]),
        ("Sam2Config", "Sam2Model", [(32, 256, 256), (64, 128, 128), (256, 64, 64)]),
    ],
)
def test_real_configurations_have_the_published_shapes(config: str, model: str, sizes: list[Any]) -> None:
    """1,024 px in, embeddings of 64 x 64 and masks of 256 x 256 out; on PyTorch's device without memory."""
    import transformers

    with torch.device("meta"):
        sam = object.__new__(Sam)
        sam.device, sam.precision = torch.device("meta"), "fp32"
        sam._model = getattr(transformers, model)(getattr(transformers, config)()).eval()
        sam.mask_side = 256
        found = sam._model.get_image_embeddings(torch.zeros(1, 3, 1024, 1024))
    names = ("image_embeddings", "intermediate_embeddings")
    features = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))
    embeddings = features["image_embeddings"]
    shapes = [tuple(part.shape[1:]) for part in (embeddings if isinstance(embeddings, list) else [embeddings])]
    assert shapes == sizes
    encoded = sam_module.EncodedImage(features, (640, 480), (768.0, 1024.0), {})
    rough = np.zeros((3, 96, 96), np.float32)
    logits, scores = sam._decode(encoded, Prompts(BOXES, POINTS, rough))
    assert logits.shape == (3, 3, 256, 256)
    assert scores.shape == (3, 3)
    assert sam._cells(encoded) == (256, 192)


def test_the_processor_of_sam_pads_a_real_photo_as_published() -> None:
    """640 x 427 pixels become 1024 x 683, in the upper left corner of 1024 x 1024."""
    from transformers import SamImageProcessorPil, SamProcessor

    processor = SamProcessor(SamImageProcessorPil())
    inputs = processor(images=[photo(427, 640)], input_boxes=[[[0.0, 0.0, 640.0, 427.0]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 1024, 1024)
    assert inputs["input_boxes"].flatten().tolist() == pytest.approx([0, 0, 1024, 683])
    assert inputs["reshaped_input_sizes"].flatten().tolist() == [1024, 683][::-1]


# --- all masks of an image


def test_automatic_masks_pass_the_filters_of_the_library(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid's masks that the processor's own filter keeps, less those whose box repeats that of a better one."""
    if tiny.family not in WITHOUT_TORCHVISION:
        pytest.skip("one filter is enough: all processors have the same")
    monkeypatch.setattr(sam_module, "POINTS_PER_SIDE", 6)
    monkeypatch.setattr(sam_module, "MIN_PREDICTED_IOU", 0.1)
    monkeypatch.setattr(sam_module, "MIN_STABILITY", 0.3)
    hw = (64, 64)  # without padding
    image = photo(*hw)
    grid = [[[(column + 0.5) / 6 * 64, (row + 0.5) / 6 * 64]] for row in range(6) for column in range(6)]
    logits, scores, _ = library_masks(tiny, image, input_points=[grid], input_labels=[[[1]] * 36])
    kept, kept_scores, boxes = tiny.processor.image_processor.filter_masks(
        logits, scores, (16, 16), [0, 0, 16, 16], 0.1, 0.3
    )
    assert 3 < len(kept) < 108
    found = tiny.sam.segment_everything(tiny.sam.encode([image])[0])
    assert 0 < len(found.logits) < len(kept)
    assert (np.diff(found.predicted_iou) <= 0).all()
    known = {round(float(score), 3): box for score, box in zip(kept_scores, boxes.tolist(), strict=True)}
    for mask, score in zip(found.logits > 0, found.predicted_iou.tolist(), strict=True):
        if score < 1:  # larger ones are clipped
            ys, xs = np.nonzero(mask.numpy())
            assert known[round(score, 3)] == [xs.min(), ys.min(), xs.max(), ys.max()]


def test_stability_compares_two_thresholds() -> None:
    """Of four pixels above -1, two are above 1. An empty mask has none."""
    logits = torch.tensor([[[2.0, 1.5], [0.5, -0.5]], [[-3.0, -3.0], [-3.0, -3.0]]])
    assert stability(logits).tolist() == [0.5, 0.0]


def test_duplicates_give_way_to_the_better_mask() -> None:
    """Masks 0 and 1 share nine tenths of their boxes; mask 2 lies elsewhere, mask 3 inside mask 1."""
    masks = torch.zeros((4, 20, 20), dtype=torch.bool)
    masks[0, :10, :10] = masks[1, :10, :9] = masks[2, 12:, 12:] = masks[3, 2:5, 2:5] = True
    assert without_duplicates(masks, torch.tensor([0.90, 0.95, 0.99, 0.89])).tolist() == [2, 1, 3]
    assert without_duplicates(masks[:0], torch.zeros(0)).tolist() == []


# --- loading


def test_checkpoints_of_a_video_model_load_as_the_image_model(tmp_path: Path) -> None:
    """The repositories of SAM 2.1 name the configuration and the processor of its video model."""
    require("sam2")
    from transformers import Sam2VideoConfig, Sam2VideoModel

    image_model = Sam(str(save_tiny_sam(tmp_path / "image", "sam2")), CPU)
    config = image_model._model.config.to_dict()
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    video = Sam2VideoModel(
        Sam2VideoConfig(
            **{name: config[name] for name in names},
            image_size=IMAGE_PX,
            memory_attention_hidden_size=16,
            memory_attention_num_layers=1,
            memory_attention_num_attention_heads=1,
            memory_attention_feed_forward_hidden_size=32,
            memory_attention_rope_feat_sizes=[4, 4],
            memory_encoder_hidden_size=16,
            memory_encoder_output_channels=8,
            mask_downsampler_embed_dim=16,
            memory_fuser_embed_dim=16,
            memory_fuser_intermediate_dim=32,
            memory_fuser_num_layers=1,
        )
    )
    missing, _ = video.load_state_dict(image_model._model.state_dict(), strict=False)
    assert not [name for name in missing if name.startswith(("vision", "prompt", "mask_decoder"))]
    video.save_pretrained(tmp_path / "video")
    image_model._processor.save_pretrained(tmp_path / "video")
    sam = Sam(str(tmp_path / "video"), CPU)
    assert type(sam._model).__name__ == "Sam2Model"
    assert type(sam._processor).__name__ == "Sam2Processor"
    (first,), (second,) = (one.encode([photo(50, 80)]) for one in (image_model, sam))
    expected, found = image_model.segment(first, own_prompts("box")), sam.segment(second, own_prompts("box"))
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("nowhere/at/all", "Repo id|nowhere"),
        ("empty", "config.json"),
        ("weights", "model.safetensors"),
        ("bert", "bert"),
        ("cut", "incomplete|header|metadata"),
        ("other", "mismatch"),
    ],
)
def test_a_model_that_cannot_be_loaded_gives_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, reason: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    (save_tiny_sam(Path("weights"), "sam") / "model.safetensors").unlink()
    cut = save_tiny_sam(Path("cut"), "sam") / "model.safetensors"  # as an interrupted download leaves it
    cut.write_bytes(cut.read_bytes()[:-100])
    other = save_tiny_sam(Path("other"), "sam") / "config.json"
    other.write_text(other.read_text().replace('"mlp_dim": 32', '"mlp_dim": 48'))
    Path("bert").mkdir()
    Path("bert/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=rf"^params\.yaml: proposals\.model: got '{broken}', .*({reason})") as caught:
        Sam(broken, CPU)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAM 2's processor needs torchvision."""
    import importlib.util

    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    from transformers import Sam2Config

    Sam2Config().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Sam2Processor"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Sam2ImageProcessor"}')
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[sam\]'.*[Tt]orchvision"):
        Sam(str(tmp_path), CPU)


def test_bf16_is_used_for_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts' coordinates, and so the masks, keep their precision."""
    folder = save_tiny_sam(tmp_path / "sam", "sam")
    networks = []
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr(sam_module, "resolve_precision", lambda setting, device, precision=precision: precision)
        networks.append(Sam(str(folder), CPU))
    exact, rough = networks
    assert (exact.precision, rough.precision) == ("fp32", "bf16")
    image = photo(50, 80)
    (encoded,), (encoded_exactly,) = rough.encode([image]), exact.encode([image])
    embeddings = encoded.features["image_embeddings"]
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, encoded_exactly.features["image_embeddings"])
    torch.testing.assert_close(embeddings, encoded_exactly.features["image_embeddings"], atol=0.1, rtol=0.1)
    prompts = own_prompts("point")
    first, second = (sam.segment(encoded_exactly, prompts) for sam in (rough, exact))
    assert isinstance(first, Masks)
    assert torch.equal(first.logits, second.logits)
