"""Models of the SAM family with random weights, saved in the hub format with their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

IMAGE_PX = 64
"""Side of the models' input; their masks have 16 x 16 cells."""
CHANNELS = 16

WITHOUT_TORCHVISION = ("sam", "sam_hq")
"""Families whose processor also works with Pillow alone."""
FAMILIES = (*WITHOUT_TORCHVISION, "sam2", "edgetam", "sam3_tracker")

_DECODER = {
    "hidden_size": CHANNELS,
    "mlp_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}
_PROMPTS = {"hidden_size": CHANNELS, "image_size": IMAGE_PX, "mask_input_channels": 8}
_FPN = {
    "fpn_hidden_size": CHANNELS,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_top_down_levels": [2, 3],
}
_HIERA = {
    "hidden_size": 12,
    "image_size": [IMAGE_PX, IMAGE_PX],
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [12, 24, 48, 96],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [8, 4, 4, 4],
    "global_attention_blocks": [3],
}


def require(family: str) -> None:
    """Skip the test if the packages that the family's processor or backbone needs are missing."""
    if family not in WITHOUT_TORCHVISION:
        pytest.importorskip("torchvision")
    if family == "edgetam":
        pytest.importorskip("timm")


def save_tiny_sam(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a model and its processor into a folder, as `save_pretrained` of a real one does."""
    require(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family)
        with torch.no_grad():  # the usual tiny weights make all masks alike
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and "vision_encoder" not in name:
                    module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5)
    model.save_pretrained(folder)
    _processor(family).save_pretrained(folder)
    return folder


def _model(family: str) -> Any:
    import transformers as hf

    vit = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 48, "image_size": IMAGE_PX}
    vit |= {"output_channels": CHANNELS, "num_pos_feats": CHANNELS // 2, "window_size": 2, "global_attn_indexes": [1]}
    match family:
        case "sam":
            return hf.SamModel(
                hf.SamConfig(
                    vision_config=vit,
                    prompt_encoder_config=_PROMPTS | {"image_embedding_size": 4},
                    mask_decoder_config=_DECODER,
                )
            )
        case "sam_hq":
            return hf.SamHQModel(
                hf.SamHQConfig(
                    vision_config=vit,
                    prompt_encoder_config=_PROMPTS | {"image_embedding_size": 4},
                    mask_decoder_config=_DECODER | {"vit_dim": 24},
                )
            )
        case "sam2":
            vision = _FPN | {"backbone_config": _HIERA, "backbone_channel_list": [96, 48, 24, 12]}
            return hf.Sam2Model(
                hf.Sam2Config(vision_config=vision, prompt_encoder_config=_PROMPTS, mask_decoder_config=_DECODER)
            )
        case "edgetam":
            backbone = {
                "model_type": "timm_wrapper",
                "architecture": "test_resnet",
                "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
            }
            vision = _FPN | {"backbone_config": backbone, "backbone_channel_list": [96, 192, 48, 32]}
            return hf.EdgeTamModel(
                hf.EdgeTamConfig(vision_config=vision, prompt_encoder_config=_PROMPTS, mask_decoder_config=_DECODER)
            )
        case "sam3_tracker":
            backbone = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
            backbone |= {"image_size": IMAGE_PX, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1]}
            vision = {"backbone_config": backbone | {"pretrain_image_size": IMAGE_PX}, "fpn_hidden_size": CHANNELS}
            vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
            return hf.Sam3TrackerModel(
                hf.Sam3TrackerConfig(
                    vision_config=vision,
                    prompt_encoder_config=_PROMPTS | {"patch_size": 16},
                    mask_decoder_config=_DECODER,
                )
            )
    raise ValueError(family)


def _processor(family: str) -> Any:
    import transformers as hf

    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    match family:
        case "sam" | "sam_hq":
            images = hf.SamImageProcessorPil(size={"longest_edge": IMAGE_PX}, pad_size=square)
            return (hf.SamProcessor if family == "sam" else hf.SamHQProcessor)(images)
        case "sam3_tracker":
            return hf.Sam3TrackerProcessor(hf.Sam3ImageProcessor(size=square), target_size=IMAGE_PX)
    return hf.Sam2Processor(hf.Sam2ImageProcessor(size=square), target_size=IMAGE_PX)
