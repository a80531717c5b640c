"""Image and text encoders: any transformers backbone and text encoder, or small ones trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from l2l_core.core.optional import hidden
from l2l_core.core.pretrained import Loading

# Needed only for unused features: multi-device models, detector losses, and drafts by a second model.
with hidden("accelerate", "scipy", "sklearn"):
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
    )

TINY = "tiny"
ENCODER_FOLDERS = ("image_encoder", "text_encoder")
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


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
    """A backbone that returns a pyramid, finest level first; `name` is `tiny`, a hub id or a folder.

    `tiny` is random, everything else pretrained. Raises ConfigError if transformers has no backbone of that name.
    """
    if name == TINY:
        return AutoBackbone.from_config(tiny_image_config())
    with _loading("image_encoder", name, "an image backbone"):
        config = AutoConfig.from_pretrained(name)
        config.out_features = [stage for stage in config.stage_names if stage != "stem"]
        # Not AutoBackbone.from_pretrained: it queries the hub for the name, even for a folder and offline.
        kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        return kind.from_pretrained(name, config=config, dtype=torch.float32)


def make_text_encoder(name: str, vocabulary: int, max_tokens: int) -> PreTrainedModel:
    """A text encoder that returns `last_hidden_state`; `name` is `tiny`, a hub id or a folder.

    `tiny` is random, everything else pretrained. Raises ConfigError if transformers cannot load it.
    """
    if name == TINY:
        return AutoModel.from_config(tiny_text_config(vocabulary, max_tokens))
    with _loading("text_encoder", name, "a text encoder"):
        return AutoModel.from_pretrained(name, dtype=torch.float32)


def blank_encoders(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Image and text encoder with random weights, from the configurations written by `save_encoder_configs`."""
    image, text = (AutoConfig.from_pretrained(folder / name) for name in ENCODER_FOLDERS)
    image_encoder = AutoBackbone.from_config(image, dtype=torch.float32)
    return image_encoder, AutoModel.from_config(text, dtype=torch.float32)


def save_encoder_configs(folder: Path, image_encoder: PreTrainedModel, text_encoder: PreTrainedModel) -> None:
    """Write the configurations for `blank_encoders`: a trained network does not need its encoders' original source."""
    for name, encoder in zip(ENCODER_FOLDERS, (image_encoder, text_encoder), strict=True):
        encoder.config.save_pretrained(folder / name)


def make_tokenizer(name: str, corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    """The text encoder's own tokenizer; for `tiny`, one token per word of the corpus, in alphabetical order.

    Raises ConfigError if transformers cannot load it.
    """
    if name != TINY:
        with _loading("text_encoder", name, "a tokenizer"):
            return AutoTokenizer.from_pretrained(name)
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
    return AutoTokenizer.from_pretrained(folder)


def _loading(key: str, name: str, what: str) -> Loading:
    where = "folder" if Path(name).exists() else "hub id (needs a network or a local copy)"
    return Loading(f"model.{key}", name, f"a {where} from which transformers loads {what}")
