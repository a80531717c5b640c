"""Open-vocabulary detectors of transformers: Grounding DINO, MM Grounding DINO, OWL-ViT, OWLv2 and SAM 3."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor, Sam3Model, Sam3Processor
from transformers.utils import is_scipy_available, is_torchvision_available

from l2l_core.config import PriorsParams
from l2l_core.core.device import autocast, choose_device, print_device, resolve_precision
from l2l_core.core.masks import encode_rle
from l2l_core.core.pretrained import Loading, not_loaded
from l2l_core.errors import ConfigError
from l2l_core.mllm.detector import Detection, DetectionRequest, best_boxes

EXPECTED = "a hub id (needs a network or a local copy) or a folder with the weights and the processor of a detector"
KEEP_ALL = -1.0
"""A threshold below every score."""
Outputs = SimpleNamespace  # tensors of a model by name, one row per sentence, as its post-processing reads them


@dataclass(frozen=True)
class _Family:
    """How to load the models of a type, and how to run them on images, the image of each sentence, and sentences."""

    model: Any  # has from_pretrained
    processor: Any  # has from_pretrained
    run: Callable[[Any, Any, Sequence[Image.Image], list[int], Sequence[str]], Outputs]
    has_masks: bool = False


class TransformersDetector:
    """One model in this process. Raises ConfigError if it is not a detector or cannot be loaded."""

    def __init__(self, params: PriorsParams) -> None:
        name = str(params.model)
        self._device = choose_device(params.engine.device, "params.yaml: priors.engine.device")
        self.precision = resolve_precision(params.precision, self._device, "priors.precision")
        print_device(self._device, self.precision)
        self._family, self._processor = load_processor(name)
        with _loading(name):
            # Weights stay in fp32, and autocast computes in bf16: boxes in bf16 would be off by pixels.
            self._model = self._family.model.from_pretrained(name, dtype=torch.float32).to(self._device).eval()

    @torch.inference_mode()
    def detect(self, requests: Sequence[DetectionRequest]) -> list[list[Detection]]:
        """The detections of each request, computed as one batch; an image is decoded and encoded once if possible."""
        index_of: dict[int, int] = {}  # id of an image -> its index among the images
        rows = [index_of.setdefault(id(request.image), len(index_of)) for request in requests]
        images = list({id(request.image): request.image for request in requests}.values())
        sentences = [request.sentence for request in requests]
        with autocast(self._device, self.precision):
            outputs = self._family.run(self._model, self._processor, images, rows, sentences)
        outputs = Outputs(**{name: tensor.float() for name, tensor in vars(outputs).items()})
        sizes = [(request.image.height, request.image.width) for request in requests]
        results = self._processor.image_processor.post_process_object_detection(outputs, KEEP_ALL, sizes)
        return [
            self._detections(outputs, row, result, request)
            for row, (result, request) in enumerate(zip(results, requests, strict=True))
        ]

    def _detections(
        self, outputs: Outputs, row: int, result: dict[str, Tensor], request: DetectionRequest
    ) -> list[Detection]:
        xyxy, score = (result[name].double().cpu().numpy() for name in ("boxes", "scores"))
        if len(score) < outputs.pred_boxes.shape[1]:  # the threshold drops nothing else
            raise FloatingPointError("the scores are not numbers")
        image_hw = (request.image.height, request.image.width)
        best = best_boxes(xyxy, score, image_hw, request.count)
        masks: list[bytes | None] = [None] * len(best)
        if self._family.has_masks and best:
            masks = self._masks(outputs, row, [chosen for chosen, _, _ in best], image_hw)
        return [Detection(box, score, mask) for (_, box, score), mask in zip(best, masks, strict=True)]

    def _masks(self, outputs: Outputs, row: int, chosen: list[int], image_hw: tuple[int, int]) -> list[bytes | None]:
        """The masks of the chosen boxes of a row; None for an empty one. Only these are brought to the image's size."""
        picked = Outputs(
            pred_logits=outputs.pred_logits[row, chosen][None],
            pred_boxes=outputs.pred_boxes[row, chosen][None],
            pred_masks=outputs.pred_masks[row, chosen][None],
            presence_logits=outputs.presence_logits[row][None],
        )
        (result,) = self._processor.image_processor.post_process_instance_segmentation(
            picked, KEEP_ALL, target_sizes=[image_hw]
        )
        masks: Sequence[np.ndarray[Any, Any]] = result["masks"].cpu().numpy()
        return [encode_rle(mask) if mask.any() else None for mask in masks]


def find_family(name: str) -> _Family:
    """Hub id or folder -> the family of the model. Raises ConfigError if it is not a detector that this file knows."""
    with _loading(name):
        kind: str = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if kind not in _FAMILIES:
        raise ConfigError(
            f"params.yaml: priors.model: got {name!r}, a model of type {kind!r}, expected a detector of type "
            f"{', '.join(_FAMILIES)} because priors.backend is detector (docs/priors.md)"
        )
    return _FAMILIES[kind]


def load_processor(name: str) -> tuple[_Family, Any]:
    """Hub id or folder -> the family of the model, and its processor. The weights are not loaded.

    Raises ConfigError if the model is not a detector that this file knows, or if its processor or a package is missing.
    """
    family = find_family(name)
    if family.has_masks and not is_torchvision_available():
        raise ConfigError(
            f"params.yaml: priors.model: got {name!r}, a SAM 3, which needs torchvision: pip install -e '.[detector]'"
        )
    is_scipy_available.cache_clear()  # `core.optional.hidden` may have hidden it, but OWLv2's image processor needs it
    with _loading(name):
        processor = family.processor.from_pretrained(name)
    if not hasattr(processor, "image_processor"):  # without a processor's files, AutoProcessor may give a tokenizer
        raise _not_loaded(name, "it has no image processor (preprocessor_config.json)")
    tokenizer = processor.tokenizer
    if tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False)["input_ids"]:
        # transformers makes a tokenizer without words if the files are missing: all sentences would be the same.
        raise _not_loaded(name, "its tokenizer knows no words (tokenizer.json or vocabulary files are missing)")
    return family, processor


def _loading(name: str) -> Loading:
    return Loading("priors.model", name, EXPECTED)


def _not_loaded(name: str, reason: str) -> ConfigError:
    return not_loaded("priors.model", name, EXPECTED, reason)


def _run_grounding_dino(
    model: Any, processor: Any, images: Sequence[Image.Image], rows: list[int], sentences: Sequence[str]
) -> Outputs:
    """Each sentence is one phrase: a full stop or a question mark within it would divide it into several."""
    pixels = processor.image_processor(images, return_tensors="pt")  # of one size: no padding
    phrases = [[re.sub(r"[.?]+", " ", sentence)] for sentence in sentences]  # the processor adds the final stop
    text = processor(
        text=phrases, padding=True, truncation=True, max_length=model.config.max_text_len, return_tensors="pt"
    )
    encoded = {name: tensor.to(model.device)[rows] for name, tensor in pixels.items()}
    outputs = model(**text.to(model.device), **encoded)
    return Outputs(logits=outputs.logits, pred_boxes=outputs.pred_boxes)


def _run_owl(
    model: Any, processor: Any, images: Sequence[Image.Image], rows: list[int], sentences: Sequence[str]
) -> Outputs:
    """An image is encoded once, and all its sentences are scored against its boxes."""
    by_image: list[list[str]] = [[] for _ in images]
    columns = []
    for row, sentence in zip(rows, sentences, strict=True):
        columns.append(len(by_image[row]))
        by_image[row].append(sentence)
    inputs = processor(
        text=by_image,
        images=images,
        truncation=True,  # these models read 16 tokens
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    outputs = model(**inputs.to(model.device))  # logits [images, boxes, most sentences of an image]
    return Outputs(logits=outputs.logits[rows, :, columns][..., None], pred_boxes=outputs.pred_boxes[rows])


def _run_sam3(
    model: Any, processor: Any, images: Sequence[Image.Image], rows: list[int], sentences: Sequence[str]
) -> Outputs:
    """An image is encoded once for all its sentences."""
    pixels = processor.image_processor(images, return_tensors="pt")
    vision = model.get_vision_features(pixel_values=pixels["pixel_values"].to(model.device))
    for name in ("fpn_hidden_states", "fpn_position_encoding"):
        vision[name] = tuple(level[rows] for level in vision[name])
    text = processor.tokenizer(  # the processor itself does not cut long sentences
        list(sentences),
        padding="max_length",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(model.device)
    outputs = model(vision_embeds=vision, input_ids=text["input_ids"], attention_mask=text["attention_mask"])
    names = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits")
    return Outputs(**{name: outputs[name] for name in names})


_GROUNDING_DINO = _Family(AutoModelForZeroShotObjectDetection, AutoProcessor, _run_grounding_dino)
_OWL = _Family(AutoModelForZeroShotObjectDetection, AutoProcessor, _run_owl)
_SAM3 = _Family(Sam3Model, Sam3Processor, _run_sam3, has_masks=True)
_FAMILIES = {
    "grounding-dino": _GROUNDING_DINO,
    "mm-grounding-dino": _GROUNDING_DINO,
    "owlv2": _OWL,
    "owlvit": _OWL,
    "sam3": _SAM3,
    "sam3_video": _SAM3,  # the published weights hold the detector and the tracker
}
"""Type in a model's configuration -> how it is run."""
