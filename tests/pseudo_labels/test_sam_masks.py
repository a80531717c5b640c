"""SAM prompted with the teacher's masks, and the match of a mask among SAM's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sam import save_tiny_sam
from toy_pairs import rows_of, toy_pairs, toy_params

from l2l_core.core.images import read_image
from l2l_core.core.masks import decode_rle
from l2l_core.data.pairs import Pairs
from l2l_core.model.sam import EncodedImage, Masks, Prompts, Sam
from l2l_core.pseudo_labels import sam_masks
from l2l_core.pseudo_labels.sam_masks import SamMasks, prompts_of, sam_masks_of

SIDE = 16


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Sam:
    return Sam(str(save_tiny_sam(tmp_path_factory.mktemp("models") / "sam", "sam")), torch.device("cpu"))


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """Six sentences about three images: 0, 0, 0, 1, 1, 2."""
    found, _ = toy_pairs(tmp_path, 6)
    return replace(found, image_row=np.array([0, 0, 0, 1, 1, 2]))


def squares(*places: tuple[int, int, int, int]) -> np.ndarray:
    """Probabilities 0.9 in boxes x1 y1 x2 y2 and 0.2 elsewhere: [N, SIDE, SIDE]."""
    prob = np.full((len(places), SIDE, SIDE), 0.2, np.float32)
    for row, (x1, y1, x2, y2) in enumerate(places):
        prob[row, y1:y2, x1:x2] = 0.9
    return prob


def test_prompts_are_in_pixels_of_the_image() -> None:
    """A cell of the mask is 5 pixels wide and 3 high. The centroid is 7.5 cells from the left and 4 from the top."""
    prompts = prompts_of(squares((6, 2, 9, 6)), (48, 80))
    assert prompts.box_xyxy.tolist() == [[30, 6, 45, 18]]
    ((x, y),) = prompts.point_xy.tolist()
    assert x == 7.5 * 5
    assert y in (3.5 * 3, 4.5 * 3)  # the nearest centers of cells
    assert prompts.mask_logits is not None
    assert prompts.mask_logits[0, 3, 7] == pytest.approx(np.log(0.9 / 0.1), abs=1e-4)
    assert prompts.mask_logits[0, 0, 0] == pytest.approx(np.log(0.2 / 0.8), abs=1e-4)


def test_the_point_lies_on_a_bent_mask() -> None:
    """The centroid of a ring is in its hole."""
    prob = squares((2, 2, 14, 14))
    prob[0, 4:12, 4:12] = 0.2
    x, y = (prompts_of(prob, (SIDE, SIDE)).point_xy[0] - 0.5).astype(int)
    assert prob[0, y, x] == np.float32(0.9)


def test_refines_each_mask_as_sam_itself_does(sam: Sam, pairs: Pairs) -> None:
    """Each sentence alone, with its own image. The second mask is empty."""
    rows = rows_of(0, 1, 3, 5)
    prob = squares((2, 3, 9, 12), (0, 0, 0, 0), (5, 5, 15, 9), (1, 1, 6, 15))
    refined = SamMasks(sam, pairs).refine(rows, prob)
    assert refined.mask.shape == prob.shape
    assert not refined.mask[1].any()
    assert refined.predicted_iou[1] == 0
    for place in (0, 2, 3):
        (encoded,) = sam.encode([read_image(pairs.image_path[pairs.image_row[rows[place]]])])
        found = sam.segment(encoded, prompts_of(prob[place : place + 1], encoded.hw))
        expected = (sam.resize(found.logits, encoded, SIDE, SIDE)[0] > 0).numpy()
        assert (refined.mask[place] == expected).mean() > 0.99  # batches of other sizes round differently
        assert refined.predicted_iou[place] == pytest.approx(float(found.predicted_iou[0]), abs=1e-4)
    assert refined.mask[0].any()


class Known:
    """A model whose automatic masks are known: the left half and the lower quarter of every image."""

    def __init__(self) -> None:
        self.encoded = 0
        self.searched = 0

    def encode(self, images: Sequence[np.ndarray]) -> list[EncodedImage]:
        self.encoded += len(images)
        return [EncodedImage({}, image.shape[:2], (0.0, 0.0), {}) for image in images]

    def segment_everything(self, image: EncodedImage) -> Masks:
        self.searched += 1
        return Masks(torch.tensor([0, 1]), np.ones(2, np.float32))

    def segment(self, image: EncodedImage, prompts: Prompts) -> Masks:
        return Masks(torch.zeros(len(prompts), dtype=torch.int64), np.full(len(prompts), 0.5, np.float32))

    def resize(self, logits: torch.Tensor, image: EncodedImage, height: int, width: int) -> torch.Tensor:
        made = torch.full((2, height, width), -1.0)
        made[0, :, : width // 2] = 1.0
        made[1, 3 * height // 4 :] = 1.0
        return made[logits]


def test_matches_the_label_among_the_masks_of_its_image(pairs: Pairs) -> None:
    """Most of the left half matches it; a third of the right half matches nothing; the lower quarter is exact."""
    label = squares((0, 0, 8, 12), (10, 0, 13, 16), (0, 12, 16, 16)) > 0.5
    first, second, third = SamMasks(Known(), pairs).match(rows_of(0, 1, 3), label)  # type: ignore[arg-type]
    assert second is None
    assert first is not None
    assert third is not None
    assert first.square.sum() == 8 * 16
    assert first.square[:, :8].all()
    np.testing.assert_array_equal(third.square, label[2])
    height, width = pairs.image_hw[0].tolist()
    full = decode_rle(first.rle, height, width)
    assert full[:, : width // 2].all()
    assert not full[:, width // 2 :].any()
    height, width = pairs.image_hw[1].tolist()
    assert decode_rle(third.rle, height, width)[3 * height // 4 :].all()


def test_an_image_is_encoded_and_searched_once_across_batches(pairs: Pairs) -> None:
    known = Known()
    masks = SamMasks(known, pairs)  # type: ignore[arg-type]
    label = squares((0, 0, 8, 12), (0, 0, 8, 12))
    for rows in (rows_of(0, 1), rows_of(2, 3), rows_of(4, 5)):
        masks.match(rows, label > 0.5)
        masks.refine(rows, label)
    assert (known.encoded, known.searched) == (3, 3)


def test_images_whose_labels_are_empty_are_not_searched(pairs: Pairs) -> None:
    known = Known()
    nothing = np.zeros((2, 16, 16), dtype=bool)
    assert SamMasks(known, pairs).match(rows_of(0, 2), nothing) == [None, None]  # type: ignore[arg-type]
    assert known.searched == 0


def test_sam_is_loaded_only_if_the_selection_uses_it(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []
    monkeypatch.setattr(sam_masks, "load_sam", lambda name, device, key: loaded.append((name, key)))

    def used(model: str | None, **select: object) -> bool:
        return sam_masks_of(toy_params(proposals={"model": model}, select=select), pairs) is not None

    assert not used(None, method="semires", candidates=["teacher"])
    assert not used("m", method="reinforce", candidates=["teacher", "prior"])
    assert not used("m", method="agreement", candidates=["teacher", "sam"])  # it takes the first
    assert not loaded
    assert used("m", method="semires", candidates=["teacher"])
    assert used("m", method="reinforce", candidates=["teacher", "sam"])
    assert used("m", method="agreement", candidates=["sam"])
    assert loaded == [("m", "train.engine.device")] * 3
