"""The public `Predictor`: one image and its sentences, with or without priors, to masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from l2l_core.artifacts import records
from l2l_core.core.device import choose_device, resolve_precision
from l2l_core.core.images import to_rgb
from l2l_core.core.masks import BoolMask, encode_rle, rle_box_xyxy
from l2l_core.data.pairs import BatchMaker, Pairs, resize_image, with_priors
from l2l_core.errors import ArtifactError, InputError
from l2l_core.model.batch_predictor import IMAGES_AT_ONCE, BatchPredictor, at_size, bare_pairs
from l2l_core.model.segmenter import Segmenter
from l2l_core.priors.proposals import render_table
from l2l_core.priors.samples import to_samples

ImageInput = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a Pillow image, or an array [H, W, 3] (RGB) or [H, W] (gray) of uint8."""
PriorInput = Sequence[float] | NDArray[Any]
"""A box [x1, y1, x2, y2] in pixels of the image, end-exclusive, or a mask [H, W] of bool."""


@dataclass(frozen=True)
class Prediction:
    """The network's prediction for one sentence, at the image's own size.

    mask: [H, W] bool, where the logit exceeds 0. prob: [H, W] float32, the foreground probability in [0, 1].
    """

    mask: BoolMask
    prob: NDArray[np.float32]

    @property
    def score(self) -> float:
        """Mean probability inside the mask, in [0.5, 1]; 0 if the mask is empty. It is not calibrated."""
        return float(self.prob[self.mask].mean()) if self.mask.any() else 0.0


@dataclass(frozen=True)
class Predictor(BatchPredictor):
    """A trained network, ready to segment.

    >>> predictor = Predictor.from_pretrained("data/rounds/2/model")  # doctest: +SKIP
    >>> predictor("photo.jpg", "the dog on the left").mask.shape  # doctest: +SKIP
    (480, 640)
    >>> found = predictor("photo.jpg", "the dog on the left", prior=[20, 130, 210, 400])  # doctest: +SKIP
    """

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "auto") -> Predictor:
        """Load a model folder, such as data/rounds/2/model, without a project.

        device: auto, cpu, cuda, cuda:N, or mps; the precision is that of the training. Raises ArtifactError if the
        folder has no usable model or does not store how it was trained, ConfigError if PyTorch does not find the
        device.
        """
        network = Segmenter.load(folder)
        try:
            network.known_proposals()
        except ArtifactError as error:
            raise ArtifactError(f"{folder}: {error}") from None
        chosen = device if isinstance(device, torch.device) else choose_device(device, "device")
        network = network.to(chosen, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        config = str(Path(folder) / "config.json")
        return cls(network, chosen, resolve_precision(network.precision_setting, chosen, "precision_setting", config))

    @overload
    def __call__(
        self, image: ImageInput, sentence: str, *, prior: PriorInput | None = None, prior_score: float = 1.0
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        image: ImageInput,
        sentence: list[str],
        *,
        prior: Sequence[PriorInput | None] | None = None,
        prior_score: float | Sequence[float] = 1.0,
    ) -> list[Prediction]: ...

    def __call__(
        self,
        image: ImageInput,
        sentence: str | list[str],
        *,
        prior: PriorInput | Sequence[PriorInput | None] | None = None,
        prior_score: float | Sequence[float] = 1.0,
    ) -> Prediction | list[Prediction]:
        """Segment the referent of one sentence, or of each of several sentences, in an image.

        image: a path, a Pillow image, or a uint8 array [H, W, 3] (RGB) or [H, W] (gray). sentence: one sentence or a
        list. prior: where the object probably is, such as a detector's box [x1, y1, x2, y2] in pixels, or a mask
        [H, W] of bool; for a list of sentences, a list with a prior or None for each. prior_score: the confidence in
        the prior, or in each, in [0, 1]. Returns one Prediction, or a list with one per sentence.

        The prior is rendered as in training: by `box`, `grabcut`, or `sam` with the model named there. The image is
        encoded once. Masks equal those of evaluation with the same prior, except for pixels whose logit rounds to the
        other side of 0. Raises InputError if the image cannot be read, no sentence is given, a prior does not fit the
        image, or the model takes no priors (data/distilled/model); ArtifactError if the model does not store its
        proposal parameters; ConfigError if SAM cannot be loaded.
        """
        is_single = isinstance(sentence, str)
        sentences = list(sentence) if isinstance(sentence, list | tuple) else [sentence]
        if not sentences or not all(isinstance(one, str) and one.strip() for one in sentences):
            raise InputError(f"sentence: got {sentence!r}, expected a sentence, or a list of sentences")
        proposals, size_px = self.network.known_proposals(), self.network.params.image_size_px
        pixels = to_rgb(image)
        height, width = pixels.shape[:2]
        pairs = bare_pairs([""] * len(sentences), [(height, width)] * len(sentences), sentences, proposals.size_px)
        if prior is not None:
            priors = list(prior) if isinstance(prior, list | tuple) and not is_single else [prior]
            if not self.network.takes_priors and any(one is not None for one in priors):
                raise InputError("prior: this model was trained without priors; use a round's, as data/rounds/2/model")
            pairs = self._with_priors(pairs, pixels, priors, prior_score)
        batches = BatchMaker(pairs, size_px, proposals.flat_prob)
        square = torch.from_numpy(resize_image(pixels, size_px)).permute(2, 0, 1)[None]
        pyramid = self.encode(square)
        found = []
        for start in range(0, len(sentences), IMAGES_AT_ONCE):
            rows = np.arange(start, min(start + IMAGES_AT_ONCE, len(sentences)))
            same = torch.zeros(len(rows), dtype=torch.int64)
            batch = batches(rows, None, np.full(len(rows), prior is None), square[same])
            for logits in self.logits(batch, pyramid.take(same)):
                full = at_size(logits, height, width)
                found.append(Prediction(full > 0, np.asarray(torch.from_numpy(full).sigmoid().numpy())))
        return found[0] if is_single else found

    def _with_priors(
        self, pairs: Pairs, pixels: NDArray[np.uint8], priors: list[Any], scores: float | Sequence[float]
    ) -> Pairs:
        """The pairs, all about one image, with their priors, rendered by the functions of the pipeline."""
        count, (height, width) = len(pairs), pixels.shape[:2]
        if len(priors) != count:
            raise InputError(f"prior: got {len(priors)}, expected one for each of {count} sentences; None: no prior")
        try:
            confidence = np.broadcast_to(np.asarray(scores, dtype=np.float64), count)
        except (ValueError, TypeError):
            confidence = np.full(count, np.nan)
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise InputError(f"prior_score: got {scores!r}, expected a number from 0 to 1, or one for each sentence")
        rows = [
            {"sent_id": row, "sample_index": 0, "score": score, **_location(prior, height, width)}
            for row, (prior, score) in enumerate(zip(priors, confidence.tolist(), strict=True))
        ]
        table = records.make_table(rows, records.PRIORS)
        refs = pd.DataFrame({"sent_id": pairs.sent_id, "image_id": 0})
        images = pd.DataFrame({"image_id": [0], "height": [height], "width": [width]})
        proposals = self.network.known_proposals()
        rendered = render_table(to_samples(table, refs, images), proposals, lambda _: pixels, str(self.device))
        return with_priors(pairs, table, rendered, proposals.flat_prob)


def _location(prior: PriorInput | None, height: int, width: int) -> dict[str, object]:
    """The columns `bbox` and `mask` of records.PRIORS. Raises InputError if the prior is not in the image."""
    if prior is None:
        return {}
    try:
        given = np.asarray(prior)
        if given.dtype == bool and given.shape == (height, width) and given.any():
            rle = encode_rle(given)
            return {"bbox": list(rle_box_xyxy(rle, height, width)), "mask": rle}
        x1, y1, x2, y2 = map(float, given)
    except (ValueError, TypeError):
        x1 = y1 = x2 = y2 = float("nan")
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        shown = f"an array {list(prior.shape)} {prior.dtype}" if isinstance(prior, np.ndarray) else repr(prior)
        raise InputError(
            f"prior: got {shown}, expected a box [x1, y1, x2, y2] with x1 < x2 <= {width} and y1 < y2 <= {height} in "
            f"pixels, or a mask [{height}, {width}] of bool with some foreground"
        )
    return {"bbox": [x1, y1, x2, y2]}
