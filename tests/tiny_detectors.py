"""Detectors of every family with random weights, saved in the hub format; needs no network."""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTProcessor,
    PreTrainedModel,
    SwinConfig,
)
from transformers.utils import is_scipy_available

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed: pip install -e '.[detector]'"
)
STD = 0.15
"""Of the random weights: large enough for image and sentence to change boxes and scores."""
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_tiny_grounding_dino(folder: Path) -> Path:
    return _save_dino(folder, GroundingDinoConfig, GroundingDinoForObjectDetection)


def save_tiny_mm_grounding_dino(folder: Path) -> Path:
    return _save_dino(folder, MMGroundingDinoConfig, MMGroundingDinoForObjectDetection)


def save_tiny_owlv2(folder: Path) -> Path:
    is_scipy_available.cache_clear()  # `core.optional.hidden` may have hidden it, but the image processor needs it
    from transformers import Owlv2ImageProcessorPil, Owlv2Processor

    processor = Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 64, "width": 64}), _letters())
    return _save_owl(folder, Owlv2Config, Owlv2ForObjectDetection, processor)


def save_tiny_owlvit(folder: Path) -> Path:
    processor = OwlViTProcessor(OwlViTImageProcessorPil(size={"height": 64, "width": 64}), _letters())
    return _save_owl(folder, OwlViTConfig, OwlViTForObjectDetection, processor)


def save_tiny_sam3(folder: Path) -> Path:
    """Needs torchvision."""
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    part = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    backbone = SHAPE | {"image_size": 56, "patch_size": 14, "window_size": 2, "pretrain_image_size": 28}
    tokenizer = _letters()
    config = Sam3Config(
        vision_config={
            "backbone_config": backbone | {"model_type": "sam3_vit_model", "global_attn_indexes": [0]},
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=SHAPE
        | {"model_type": "clip_text_model", "projection_dim": 16, "max_position_embeddings": 32}
        | {"vocab_size": len(tokenizer), "bos_token_id": 53, "eos_token_id": 54},
        geometry_encoder_config=part | {"num_layers": 1},
        detr_encoder_config=part | {"num_layers": 1},
        detr_decoder_config=part | {"num_layers": 2, "num_queries": 12},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    processor = Sam3Processor(Sam3ImageProcessor(size={"height": 56, "width": 56}), tokenizer)
    return _save(folder, _random(lambda: Sam3Model(config)), processor)


def save_tiny_sam3_video(folder: Path, detector: Path) -> Path:
    """The detector in a folder together with a random tracker, as in facebook/sam3. Needs torchvision."""
    from transformers import Sam3Model, Sam3Processor, Sam3TrackerVideoConfig, Sam3VideoConfig, Sam3VideoModel

    inner = Sam3Model.from_pretrained(detector)
    fuser = {"embed_dim": 32, "intermediate_dim": 32, "num_layers": 1}
    attention = {"hidden_size": 32, "num_layers": 1, "feed_forward_hidden_size": 32, "rope_feat_sizes": [4, 4]}
    tracker = Sam3TrackerVideoConfig(
        vision_config=inner.config.vision_config,
        image_size=56,
        prompt_encoder_config={"hidden_size": 32, "image_size": 56, "patch_size": 14, "mask_input_channels": 4},
        mask_decoder_config=SHAPE | {"mlp_dim": 32, "iou_head_hidden_dim": 32, "iou_head_depth": 2},
        mask_downsampler_embed_dim=32,
        memory_encoder_hidden_size=32,
        memory_encoder_output_channels=16,
        **{f"memory_fuser_{name}": value for name, value in fuser.items()},
        **{f"memory_attention_{name}": value for name, value in attention.items()},
    )
    model = _random(lambda: Sam3VideoModel(Sam3VideoConfig(detector_config=inner.config, tracker_config=tracker)))
    model.detector_model.load_state_dict(inner.state_dict())
    return _save(folder, model, Sam3Processor.from_pretrained(detector))


SAVE: dict[str, Callable[[Path], Path]] = {
    "grounding-dino": save_tiny_grounding_dino,
    "mm-grounding-dino": save_tiny_mm_grounding_dino,
    "owlv2": save_tiny_owlv2,
    "owlvit": save_tiny_owlvit,
    "sam3": save_tiny_sam3,
}


def _save_dino(folder: Path, config_class: type, model_class: type[PreTrainedModel]) -> Path:
    tokenizer = _words()
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    sides = {
        f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads", "n_points")
    }
    config = config_class(
        backbone_config=backbone,
        text_config=BertConfig(**SHAPE, vocab_size=len(tokenizer), max_position_embeddings=64),
        d_model=32,  # GroupNorm has 32 groups
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
        num_feature_levels=3,
        max_text_len=24,
        **sides,
    )
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 107})
    return _save(folder, _random(lambda: model_class(config)), GroundingDinoProcessor(images, tokenizer))


def _save_owl(folder: Path, config_class: type, model_class: type[PreTrainedModel], processor: object) -> Path:
    ends = {"bos_token_id": 53, "eos_token_id": 54}
    config = config_class(
        text_config=SHAPE | ends | {"vocab_size": 55, "max_position_embeddings": 16},
        vision_config=SHAPE | {"image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    return _save(folder, _random(lambda: model_class(config)), processor)


def _random(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bbox_embed" in name:
                torch.nn.init.normal_(parameter, std=STD)
    return model


def _save(folder: Path, model: PreTrainedModel, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def _words() -> BertTokenizer:
    """BERT's tokenizer with letters and a few words. Grounding DINO expects BERT's ids of the special tokens."""
    known = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    own = ["the", "red", "blue", "cup", "dog", "left", *string.ascii_lowercase]
    own += [f"##{letter}" for letter in string.ascii_lowercase]
    ids = {**known, **{word: 1100 + place for place, word in enumerate(own)}}
    names = {place: word for word, place in ids.items()}
    return BertTokenizer(vocab={names.get(place, f"[unused{place}]"): place for place in range(1100 + len(own))})


def _letters() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: each letter is a token."""
    tokens = ["!", *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[], pad_token="!")
