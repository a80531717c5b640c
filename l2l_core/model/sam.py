"""The Segment Anything family (SAM, SAM 2, EdgeTAM, SAM-HQ, SAM 3's tracker), run by transformers: prompts -> masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from l2l_core.core.arrays import DoubleArray, FloatArray
from l2l_core.core.device import Precision, autocast, choose_device, print_device, resolve_precision
from l2l_core.core.optional import hide_packages
from l2l_core.core.pretrained import Loading

Image = NDArray[np.uint8]

IMAGES_AT_ONCE = 4
"""Images encoded at once. At 1,024 px the encoder of a ViT-H needs some GiB for them, and more are not faster."""
PROMPTS_AT_ONCE = 32
"""Prompts decoded at once: each takes tens of MiB in the mask decoder."""
LOGIT_LIMIT = 10.0
"""A rough mask's logits are clipped to this: probabilities of 0 and 1 have none."""

WEIGHTS = ("*.safetensors", "*.bin")

POINTS_PER_SIDE = 32
MIN_PREDICTED_IOU, MIN_STABILITY, MAX_BOX_IOU = 0.88, 0.95, 0.7
STABILITY_OFFSET = 1.0
"""Defaults of SAM's automatic mask generator (segment-anything, `SamAutomaticMaskGenerator`): grid of points, limits of
predicted IoU and stability, and the box IoU above which the worse of two masks is a duplicate."""


@dataclass(frozen=True)
class Prompts:
    """N prompts about one image, in its original pixels; each has a box, a point, or both; NaN: none."""

    box_xyxy: DoubleArray  # [N, 4]
    point_xy: DoubleArray  # [N, 2], on the object
    mask_logits: FloatArray | None = None  # [N, M, M] logits of rough masks, stretched over the whole image

    def __len__(self) -> int:
        return len(self.box_xyxy)

    def take(self, rows: NDArray[np.int64]) -> Prompts:
        """The prompts of the given rows, in that order."""
        mask_logits = None if self.mask_logits is None else self.mask_logits[rows]
        return Prompts(self.box_xyxy[rows], self.point_xy[rows], mask_logits)


@dataclass(frozen=True)
class EncodedImage:
    """An image as the model sees it; encoded once for all prompts about it."""

    features: dict[str, Any]  # arguments of the model's forward pass: float32, a batch of one
    hw: tuple[int, int]  # original size
    extent_xy: tuple[float, float]  # where its lower right corner lies in the model's input, which may be padded
    padding: dict[str, Any]  # what the processor needs to know to remove the padding


@dataclass(frozen=True)
class Masks:
    """N masks of one image, as the model returns them."""

    logits: Tensor  # [N, L, L] float32 over the model's input, on its device; `Sam.resize` fits them to the image
    predicted_iou: FloatArray  # [N] the model's own estimate of each mask's IoU with the object, in [0, 1]


class Sam:
    """A model of the family in this process. Raises ConfigError if it cannot be loaded.

    name: hub id or folder. The image encoder computes in bf16 where the device does so natively. The small mask decoder
    computes in fp32: bf16 would round a prompt's coordinates to whole cells of the mask.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.precision: Precision = resolve_precision("auto", device)
        with _loading(name):
            kind, _ = _kind_of(name)
            self._processor = _processor_of(name, kind)
            self._model = kind.from_pretrained(name, dtype=torch.float32).to(device).eval()
        self.mask_side = 4 * int(self._model.prompt_encoder.image_embedding_size[0])
        print_device(device, self.precision)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image]) -> list[EncodedImage]:
        """Images [H, W, 3] uint8 RGB of any sizes -> their encodings; at most IMAGES_AT_ONCE are computed at once."""
        parts = [images[start : start + IMAGES_AT_ONCE] for start in range(0, len(images), IMAGES_AT_ONCE)]
        return [encoded for part in parts for encoded in self._encode(part)]

    def _encode(self, images: Sequence[Image]) -> list[EncodedImage]:
        # Where the processor moves the corner of the image is where it moves all its coordinates, in every family.
        corners = [[[0.0, 0.0, float(image.shape[1]), float(image.shape[0])]] for image in images]
        inputs = [
            # A picture one pixel high would pass for one with its channels first.
            self._processor(
                images=[image], input_boxes=[corner], input_data_format="channels_last", return_tensors="pt"
            )
            for image, corner in zip(images, corners, strict=True)
        ]
        pixels = torch.cat([one["pixel_values"] for one in inputs]).to(self.device)
        with autocast(self.device, self.precision):
            found = self._model.get_image_embeddings(pixels)
        # SAM-HQ also returns features of inner layers, which its decoder requires.
        names = ("image_embeddings", "intermediate_embeddings")
        features = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))
        encoded = []
        for row, (image, one) in enumerate(zip(images, inputs, strict=True)):
            padding = {"reshaped_input_sizes": one["reshaped_input_sizes"]} if "reshaped_input_sizes" in one else {}
            extent_x, extent_y = one["input_boxes"].flatten().tolist()[2:]
            size = (image.shape[0], image.shape[1])
            encoded.append(EncodedImage(_row(features, row), size, (extent_x, extent_y), padding))
        return encoded

    @torch.inference_mode()
    def segment(self, image: EncodedImage, prompts: Prompts) -> Masks:
        """The mask of each prompt: of the several that the model proposes, the one with the highest predicted IoU."""
        logits, scores = self._decode_all(image, prompts)
        best = scores.argmax(1)
        every = torch.arange(len(best), device=self.device)
        return Masks(logits[every, best], _predicted_iou(scores[every, best]))

    @torch.inference_mode()
    def segment_everything(self, image: EncodedImage) -> Masks:
        """Masks of all objects and parts: a grid of points as prompts, without unsure, unstable and duplicate masks.

        As SAM's automatic mask generator without crops of the image. Best predicted IoU first.
        """
        height, width = image.hw
        x, y = np.meshgrid(*((np.arange(POINTS_PER_SIDE) + 0.5) / POINTS_PER_SIDE * side for side in (width, height)))
        points = np.stack([x.ravel(), y.ravel()], axis=1)
        nowhere = np.full((1, 4), np.nan)
        kept: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(points), PROMPTS_AT_ONCE):
            some = points[start : start + PROMPTS_AT_ONCE]
            logits, scores = self._decode_all(image, Prompts(np.repeat(nowhere, len(some), axis=0), some))
            kept.append(self._sure(image, logits.flatten(0, 1), scores.flatten()))
        logits, scores = (torch.cat(parts) for parts in zip(*kept, strict=True))
        best = without_duplicates(self._without_padding(image, logits) > 0, scores)
        return Masks(logits[best], _predicted_iou(scores[best]))

    @torch.inference_mode()
    def resize(self, logits: Tensor, image: EncodedImage, height: int, width: int) -> Tensor:
        """Mask logits [N, L, L] -> [N, height, width] over the whole image; foreground is above 0.

        As the model's processor does it: bilinear, without the padding of the model's input.
        """
        size = {"original_sizes": [(height, width)]} | image.padding
        parts = [  # a part at once: the processor first enlarges padded masks to the model's input
            self._processor.post_process_masks([some[:, None]], binarize=False, **size)[0][:, 0]
            for some in torch.split(logits, PROMPTS_AT_ONCE)
        ]
        return torch.cat(parts)

    def probabilities(self, logits: Tensor, image: EncodedImage, size_px: int) -> FloatArray:
        """Mask logits [N, L, L] -> [N, size_px, size_px] over the whole image: mean probability of a cell."""
        whole = -(-self.mask_side // size_px) * size_px  # at least the masks' own resolution
        prob = self.resize(logits, image, whole, whole).sigmoid()
        return F.interpolate(prob[:, None], (size_px, size_px), mode="area")[:, 0].cpu().numpy()

    def _sure(self, image: EncodedImage, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The masks and scores, [N, L, L] and [N], of those with a high predicted IoU and a stable border."""
        stable = stability(self._without_padding(image, logits)) > MIN_STABILITY
        sure = stable & (scores > MIN_PREDICTED_IOU)
        return logits[sure], scores[sure]

    def _decode_all(self, image: EncodedImage, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Logits [N, K, L, L] and scores [N, K] of the K masks that the model proposes for each of N prompts."""
        parts = np.stack([np.isnan(prompts.box_xyxy).any(axis=1), np.isnan(prompts.point_xy).any(axis=1)], axis=1)
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        order: list[NDArray[np.int64]] = []
        for kind in np.unique(parts, axis=0):  # of one kind: a filler for a missing part would prompt the model as well
            rows = (parts == kind).all(axis=1).nonzero()[0]
            for start in range(0, len(rows), PROMPTS_AT_ONCE):
                order.append(rows[start : start + PROMPTS_AT_ONCE])
                found = self._decode(image, prompts.take(order[-1]))
                logits.append(found[0])
                scores.append(found[1])
        back = torch.from_numpy(np.argsort(np.concatenate(order))).to(self.device)
        return torch.cat(logits)[back], torch.cat(scores)[back]

    def _decode(self, image: EncodedImage, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """`_decode_all` for prompts that all have the same parts."""
        count = len(prompts)
        scale = np.array(image.extent_xy) / image.hw[::-1]
        inputs: dict[str, Tensor] = {}
        if not np.isnan(prompts.box_xyxy).any():
            inputs["input_boxes"] = torch.from_numpy(prompts.box_xyxy * np.tile(scale, 2)).float()[:, None]
        if not np.isnan(prompts.point_xy).any():
            inputs["input_points"] = torch.from_numpy(prompts.point_xy * scale).float()[:, None, None]
            inputs["input_labels"] = torch.ones((count, 1, 1), dtype=torch.int64)
        if prompts.mask_logits is not None:
            inputs["input_masks"] = self._mask_input(image, torch.from_numpy(prompts.mask_logits))
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        # One prompt per element of the batch: a mask prompt belongs to an image, not to a point or box.
        features = _each(image.features, lambda value: value.expand(count, *value.shape[1:]))
        found = self._model(**features, **inputs, multimask_output=True)
        return found.pred_masks[:, 0].float(), found.iou_scores[:, 0].float()

    def _mask_input(self, image: EncodedImage, logits: Tensor) -> Tensor:
        """Logits [N, M, M] over the whole image -> [N, 1, L, L] over the model's input; its padding is background."""
        side, (height, width) = self.mask_side, self._cells(image)
        clipped = logits[:, None].float().clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        small = F.interpolate(clipped, (height, width), mode="bilinear", align_corners=False, antialias=True)
        return F.pad(small, (0, side - width, 0, side - height), value=-LOGIT_LIMIT)

    def _without_padding(self, image: EncodedImage, logits: Tensor) -> Tensor:
        """Logits [N, L, L] -> [N, h, w], the cells in the image."""
        height, width = self._cells(image)
        return logits[:, :height, :width]

    def _cells(self, image: EncodedImage) -> tuple[int, int]:
        """Rows and columns of a mask [L, L] that lie in the image; the others are padding."""
        cells = self.mask_side / self._model.prompt_encoder.input_image_size
        width, height = (max(1, round(extent * cells)) for extent in image.extent_xy)
        return height, width


def precision_on(device: str) -> Precision:
    """The precision in which a model's image encoder computes on a device, as a parameter names it."""
    return resolve_precision("auto", choose_device(device, "params.yaml: priors.engine.device"))


@cache
def load_sam(name: str, device: str, key: str) -> Sam:
    """The model `name`, loaded once per process; device: as a parameter names it, key: that parameter."""
    return Sam(name, choose_device(device, f"params.yaml: {key}"))


def check_sam(folder: str) -> str:
    """The class of the model in a folder. Raises ConfigError if it or its packages are missing; reads no weights."""
    with _loading(folder):
        kind, config = _kind_of(folder)
        _processor_of(folder, kind)
        with torch.device("meta"):  # a backbone can need a package of its own
            kind(config)
        if not any(file for pattern in WEIGHTS for file in Path(folder).glob(pattern)):
            raise OSError(f"no file {' or '.join(WEIGHTS)}")
    return str(kind.__name__)


def stability(logits: Tensor) -> Tensor:
    """IoU of a mask with itself at a higher and a lower threshold: logits [..., L, L] -> [...]; 0 for an empty mask."""
    inside, around = ((logits > offset).flatten(-2).sum(-1) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return inside / around.clamp_min(1)


def without_duplicates(masks: Tensor, scores: Tensor) -> Tensor:
    """Masks [N, L, L] bool and scores [N] > 0 -> rows to keep, best first: no box overlaps a better one's too much."""
    boxes = [cv2.boundingRect(mask) for mask in masks.cpu().numpy().astype(np.uint8)]
    # OpenCV's boxes are x, y, width, height.
    rows = cv2.dnn.NMSBoxes(boxes, scores.cpu().tolist(), 0.0, MAX_BOX_IOU) if boxes else []
    return torch.as_tensor(np.asarray(rows, dtype=np.int64), device=masks.device)


def _kind_of(name: str) -> tuple[Any, Any]:
    """The model class of transformers for a hub id or folder, and its configuration."""
    with hide_packages("scipy", "sklearn"):  # for losses of detectors, and assisted decoding
        from transformers import AutoConfig  # here, since the estimates of a run read this module's constants
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING

    config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_MASK_GENERATION_MAPPING:
        raise ValueError(f"its model_type is {config.model_type}")
    return MODEL_FOR_MASK_GENERATION_MAPPING[type(config)], config


def _processor_of(name: str, kind: Any) -> Any:
    """By the class of the image model, since checkpoints of SAM 2 and SAM 3 name the processor of their video model."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING[kind.config_class].from_pretrained(name)


def _loading(name: str) -> Loading:
    expected = (
        "a hub id (needs a network or a local copy) or a folder of a model of the SAM family that transformers loads; "
        "SAM 2, EdgeTAM and SAM 3 also need the packages of pip install -e '.[sam]'"
    )
    return Loading("proposals.model", name, expected)


def _predicted_iou(scores: Tensor) -> FloatArray:
    """SAM's head is linear and can leave [0, 1]."""
    return scores.clamp(0, 1).cpu().numpy()


def _row(features: Any, row: int) -> Any:
    """One row of every tensor, in float32, and not a view that would keep the others in memory."""
    return _each(features, lambda value: value[row : row + 1].float().clone())


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested dicts and sequences."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    return [_each(part, change) for part in value]
