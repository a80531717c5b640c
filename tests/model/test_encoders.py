import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from toy_pairs import MODEL, rows_of, toy_batches, toy_pairs
from transformers import (
    BertConfig,
    BertModel,
    ConvNextV2Config,
    ConvNextV2Model,
    SwinConfig,
    SwinModel,
    TimmBackboneConfig,
)
from transformers.utils import import_utils

from l2l_core.errors import ArtifactError, ConfigError
from l2l_core.model.encoders import (
    blank_encoders,
    make_image_encoder,
    make_text_encoder,
    make_tokenizer,
    normalization,
    save_encoder_configs,
)
from l2l_core.model.segmenter import Segmenter

CORPUS = ["left cat", "the red dog, not the cat's", "Right DOG"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test uses the network, and transformers does not report newly initialized norms."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def save_backbone(folder, family: str):
    torch.manual_seed(1)
    match family:
        case "swin":
            model = SwinModel(
                SwinConfig(
                    image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4
                )
            )
        case "convnextv2":
            model = ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]))
    model.save_pretrained(folder / family)
    return str(folder / family)


def save_bert(folder, dtype=torch.float32):
    tokenizer = make_tokenizer("tiny", CORPUS)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).to(dtype).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return str(folder / "bert")


@pytest.mark.parametrize("family", ["swin", "convnextv2"])
def test_loads_backbones_and_text_encoders_from_folders(tmp_path, family):
    """Pretrained weights are loaded, a forward pass works, and the saved network does not need the encoder folders."""
    image_folder, text_folder = save_backbone(tmp_path, family), save_bert(tmp_path)
    pairs, _ = toy_pairs(tmp_path / "images", 3)
    params = MODEL.model_copy(update={"image_encoder": image_folder, "text_encoder": text_folder})
    network = Segmenter.create(params, ["never a word of the corpus"], seed=5).eval()
    for encoder, folder in ((network.image_encoder, image_folder), (network.text_encoder, text_folder)):
        stored = {value.numpy().tobytes() for value in load_file(f"{folder}/model.safetensors").values()}
        loaded = {value.numpy().tobytes() for value in encoder.state_dict().values()}
        assert len(stored) > 10
        assert stored <= loaded  # by value: names differ between a whole model and its backbone
    batch = toy_batches(pairs)(rows_of(0, 1, 2))
    with torch.no_grad():
        before = network(batch, network.tokenize(batch))
    assert before.mask_logits.shape == (3, 1, 32, 32)
    assert before.mask_logits.isfinite().all()

    network.save(tmp_path / "run")
    for folder in (image_folder, text_folder):
        (tmp_path / "gone").mkdir(exist_ok=True)
        (tmp_path / folder).rename(tmp_path / "gone" / folder.split("/")[-1])
    again = Segmenter.load(tmp_path / "run").eval()
    with torch.no_grad():
        after = again(batch, again.tokenize(batch))
    assert torch.equal(before.mask_logits, after.mask_logits)
    assert torch.equal(before.refined_logits, after.refined_logits)


def test_pyramid_levels_go_from_fine_to_coarse(tmp_path):
    for name in ("tiny", save_backbone(tmp_path, "swin"), save_backbone(tmp_path, "convnextv2")):
        encoder = make_image_encoder(name).eval()
        maps = encoder(torch.zeros(1, 3, 64, 64)).feature_maps
        sides = [level.shape[-1] for level in maps]
        assert sides == [16, 8, 4, 2]
        assert [level.shape[1] for level in maps] == list(encoder.channels)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        (None, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),  # no file: ImageNet's values
        ({"image_mean": [0.5, 0.5, 0.25], "image_std": [0.5, 0.25, 0.5]}, [127.5, 127.5, 63.75], [127.5, 63.75, 127.5]),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 128}, [64.0] * 3, [64.0] * 3),
        ({"image_mean": [127] * 3, "image_std": [128] * 3, "do_rescale": False}, [127.0] * 3, [128.0] * 3),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, [0.0] * 3, [255.0] * 3),
    ],
)
def test_normalization_comes_with_the_encoder(tmp_path, settings, mean, std):
    """(value / 255 - image_mean) / image_std = (value - pixel_mean) / pixel_std, also after saving the network."""
    folder = save_backbone(tmp_path, "convnextv2")
    if settings is not None:
        (tmp_path / "convnextv2" / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = make_image_encoder(folder)
    save_encoder_configs(tmp_path / "run", encoder, make_text_encoder("tiny", 8, 8))
    for one in (encoder, blank_encoders(tmp_path / "run")[0]):
        for found, expected in zip(normalization(one), (mean, std), strict=True):
            torch.testing.assert_close(found, torch.tensor(expected))


def test_network_normalizes_images_by_its_encoder(tmp_path):
    folder = save_backbone(tmp_path, "convnextv2")
    settings = {"image_mean": [127] * 3, "image_std": [128] * 3, "do_rescale": False}
    (tmp_path / "convnextv2" / "preprocessor_config.json").write_text(json.dumps(settings))
    network = Segmenter.create(MODEL.model_copy(update={"image_encoder": folder}), CORPUS, seed=0).eval()
    seen = []
    network.image_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.encode_image(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    assert seen[0].unique().tolist() == [1.0]


@pytest.mark.parametrize("architecture", ["resnet10t", "convnext_atto"])
def test_loads_timm_backbones_from_folders(tmp_path, architecture):
    """The four coarsest levels of timm's own features, with timm's normalization."""
    pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    model = timm.create_model(architecture).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    encoder = make_image_encoder(str(tmp_path / "timm")).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)[-4:]
        for found, wanted in zip(encoder(images).feature_maps, expected, strict=True):
            torch.testing.assert_close(found, wanted)
    assert [level.shape[-1] for level in expected] == [16, 8, 4, 2]
    torch.testing.assert_close(normalization(encoder)[0], 255 * torch.tensor(model.pretrained_cfg["mean"]))

    (tmp_path / "timm").rename(tmp_path / "gone")
    save_encoder_configs(tmp_path / "run", encoder, make_text_encoder("tiny", 8, 8))
    again, _ = blank_encoders(tmp_path / "run")
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images).feature_maps[-1], encoder(images).feature_maps[-1])


def test_a_timm_backbone_without_timm_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} requires timm"))
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t", "pretrained_cfg": {}}')
    match = r"model\.image_encoder: got .*, expected .* an image backbone: .*requires timm"
    with pytest.raises(ConfigError, match=match):
        make_image_encoder(str(tmp_path))


def test_a_model_folder_of_a_timm_backbone_names_timm_where_it_is_missing(tmp_path, monkeypatch):
    Segmenter.create(MODEL, CORPUS, seed=0).save(tmp_path)
    TimmBackboneConfig(backbone="resnet10t").save_pretrained(tmp_path / "image_encoder")
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} requires timm"))
    with pytest.raises(ArtifactError, match=r"no usable model: TimmBackbone requires timm$"):
        Segmenter.load(tmp_path)


def test_loads_half_precision_weights_in_single_precision(tmp_path):
    folder = save_bert(tmp_path, torch.bfloat16)
    assert load_file(f"{folder}/model.safetensors")["embeddings.word_embeddings.weight"].dtype == torch.bfloat16
    assert {value.dtype for value in make_text_encoder(folder, 0, 0).parameters()} == {torch.float32}
    params = MODEL.model_copy(update={"text_encoder": folder})
    Segmenter.create(params, [], seed=0).save(tmp_path / "run")
    assert {value.dtype for value in Segmenter.load(tmp_path / "run").parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder", "nothing"])
def test_refuses_an_unknown_encoder_and_names_the_parameter(name):
    with pytest.raises(ConfigError, match=rf"^params\.yaml: model\.image_encoder: got '{name}', expected a hub id"):
        make_image_encoder(name)
    with pytest.raises(ConfigError, match=rf"^params\.yaml: model\.text_encoder: got '{name}', expected a hub id"):
        make_text_encoder(name, 0, 0)
    with pytest.raises(ConfigError, match=r"model\.text_encoder: .* a tokenizer"):
        make_tokenizer(name, [])


def test_refuses_a_folder_of_another_kind(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (save_bert(tmp_path), str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match=r"model\.image_encoder: got .*, expected a folder from which") as caught:
            make_image_encoder(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.text_encoder: got .*, expected a folder from which"):
        make_text_encoder(str(tmp_path / "empty"), 0, 0)


def test_refuses_damaged_weights(tmp_path):
    """As an interrupted download leaves them."""
    folder = save_bert(tmp_path)
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.text_encoder: got .*, expected a folder from which .*incomplete"):
        make_text_encoder(folder, 0, 0)


# --- tokenizer built from scratch


def test_vocabulary_does_not_depend_on_the_corpus_order():
    vocabulary = make_tokenizer("tiny", CORPUS).get_vocab()
    assert make_tokenizer("tiny", [*CORPUS[::-1], CORPUS[0]]).get_vocab() == vocabulary
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    assert set(vocabulary) - special == {"left", "right", "cat", "dog", "the", "red", "not", ",", "'", "s"}
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert vocabulary["[PAD]"] == 0


def test_tokenizer_encodes_words_and_segments():
    tokenizer = make_tokenizer("tiny", CORPUS)
    encoded = tokenizer(["Left ZEBRA"], ["dog"], padding="max_length", max_length=8)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert names == ["[CLS]", "left", "[UNK]", "[SEP]", "dog", "[SEP]", "[PAD]", "[PAD]"]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert encoded["attention_mask"][0] == [1, 1, 1, 1, 1, 1, 0, 0]


def test_vocabulary_does_not_duplicate_special_tokens():
    vocabulary = make_tokenizer("tiny", ["[UNK] [PAD] a"]).get_vocab()
    assert vocabulary["[PAD]"] == 0
    assert vocabulary["[UNK]"] == 1


def test_saved_tokenizer_encodes_as_before(tmp_path):
    tokenizer = make_tokenizer("tiny", CORPUS)
    tokenizer.save_pretrained(tmp_path)
    again = make_tokenizer(str(tmp_path), [])
    assert dict(again(["red dog"], ["unknown cat"])) == dict(tokenizer(["red dog"], ["unknown cat"]))
