"""Scenes and sentences as the tensors that RefShapes-VLM learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2l_core.data.augment import mirror_sentence
from vlm.build import (
    ANSWER,
    BOS,
    EOS,
    IMAGE,
    IMAGE_MEAN,
    IMAGE_STD,
    JOINTS,
    PAD,
    confidence_tokens,
    question_text,
    response_text,
)
from vlm.scenes import GRID, Scenes

PREFIX = 1 + GRID * GRID  # tokens before a question: <s> and the image
IGNORED = -100  # label of a token that is not learnt
SURE = 9  # tenths: a confidence that stands for the one which training puts there


@dataclass(frozen=True)
class Seen:
    """What the tower gets of B scenes, and what it should see in each of P patches."""

    pixels: Tensor  # [B, 3, S, S], as the image processor makes them
    attributes: Tensor  # [B, P, A] int64: 1 + the value of each of scenes.ATTRIBUTES, 0 where no object is
    xyxy: Tensor  # [B, P, 4] the object's box in shares of the image, 0 where there is none


@dataclass(frozen=True)
class Lessons:
    """Several questions and responses of each of B scenes in one row of L tokens: all see the image, none another."""

    ids: Tensor  # [B, L]
    labels: Tensor  # [B, L] the responses' tokens, elsewhere IGNORED
    position: Tensor  # [B, L] as if a question were alone
    group: Tensor  # [B, L] number of the question, 0: the image, -1: padding
    joint: Tensor  # [Q, 2] row and place of the token before each response's box
    object_of: Tensor  # [Q, P] int64: number of the object in each patch of the question's image, -1: none
    target: Tensor  # [Q] number of the object that is meant


def see(scenes: Scenes, rows: NDArray[np.int64], flip: NDArray[np.bool_], device: torch.device) -> Seen:
    """Scenes `rows` [B], mirrored where `flip` [B]."""
    images = scenes.images[rows]
    images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device).float()
    patches = _patches(scenes, rows, flip)
    there, which = (patches >= 0)[..., None], np.maximum(patches, 0)[..., None].astype(np.int64)
    attributes = np.take_along_axis(scenes.attributes[rows].astype(np.int64), which, axis=1) + 1
    boxes = np.take_along_axis(_mirrored(scenes.xyxy[rows], flip[:, None]), which, axis=1)
    return Seen(
        (pixels / 255 - IMAGE_MEAN) / IMAGE_STD,
        torch.from_numpy(np.where(there, attributes, 0)).to(device),
        torch.from_numpy(np.where(there, boxes, 0).astype(np.float32)).to(device),
    )


class Questions:
    """The sentences of scenes, as tokens."""

    def __init__(self, scenes: Scenes, tokenizer: Any) -> None:
        self.scenes = scenes
        self._tokenizer = tokenizer
        self._first = np.searchsorted(scenes.scene, np.arange(len(scenes.images) + 1))
        (self._before_box,) = tokenizer.encode(JOINTS[4])
        self._confidences = confidence_tokens(tokenizer)

    def draw(
        self,
        rows: NDArray[np.int64],
        flip: NDArray[np.bool_],
        per_scene: int,
        rng: np.random.Generator,
        device: torch.device,
    ) -> Lessons:
        """Up to `per_scene` drawn sentences of each of the scenes `rows` [B], mirrored where `flip` [B]."""
        patches = _patches(self.scenes, rows, flip)
        made, joints, targets = [], [], []
        for place, (row, is_mirrored) in enumerate(zip(rows.tolist(), flip.tolist(), strict=True)):
            ids, labels = [BOS] + [IMAGE] * (PREFIX - 1), [IGNORED] * PREFIX
            position, group = list(range(PREFIX)), [0] * PREFIX
            drawn = rng.permutation(np.arange(self._first[row], self._first[row + 1]))[:per_scene]
            for number, entry in enumerate(drawn.tolist(), start=1):
                question, said = self._tokens(entry, is_mirrored)
                # The response ends behind any confidence; which one is right, training puts into the labels.
                read = [*said[:-2], int(rng.choice(self._confidences)), EOS]
                joints.append((place, len(ids) + len(question) + said.index(self._before_box)))
                targets.append(int(self.scenes.target[entry]))
                ids += question + read
                labels += [IGNORED] * len(question) + said
                position += range(PREFIX, PREFIX + len(question) + len(said))
                group += [number] * (len(question) + len(said))
            made.append((ids, labels, position, group))
        length = max(len(ids) for ids, *_ in made)
        columns = zip(zip(*made, strict=True), (PAD, IGNORED, 0, -1), strict=True)
        padded: Any = (torch.tensor([v + [fill] * (length - len(v)) for v in part]) for part, fill in columns)
        joint = torch.tensor(joints)
        object_of = torch.from_numpy(patches.astype(np.int64))[joint[:, 0]]
        parts: Any = [*padded, joint, object_of, torch.tensor(targets)]
        return Lessons(*(part.to(device) for part in parts))

    def _tokens(self, entry: int, is_mirrored: bool) -> tuple[list[int], list[int]]:
        """Question and response."""
        sentence = str(self.scenes.sentences[entry])
        box = self.scenes.xyxy[self.scenes.scene[entry], self.scenes.target[entry]]
        if is_mirrored:
            sentence = mirror_sentence(sentence)
            box = _mirrored(box, np.array(True))
        x1, y1, x2, y2 = (round(100 * value) for value in box.tolist())
        question = [*self._tokenizer.encode(question_text(sentence)), ANSWER]
        return question, [*self._tokenizer.encode(response_text(sentence, (x1, y1, x2, y2), SURE)), EOS]


def visible(group: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of questions [B, L] (`Lessons.group`) -> what is added to attention logits, [B, 1, L, L].

    Each token attends to earlier ones of its own question and of the image.
    """
    order = torch.arange(group.shape[1], device=group.device)
    causal = order[None, :, None] >= order[None, None, :]
    seen = causal & ((group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0))
    return torch.zeros(seen.shape, dtype=dtype, device=group.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _patches(scenes: Scenes, rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Object of each patch [B, P], -1: none."""
    grid = scenes.patch_object[rows].reshape(len(rows), GRID, GRID)
    return np.where(flip[:, None, None], grid[:, :, ::-1], grid).reshape(len(rows), -1)


def _mirrored(xyxy: NDArray[np.float32], flip: NDArray[np.bool_]) -> NDArray[np.float32]:
    mirrored = np.stack([1 - xyxy[..., 2], xyxy[..., 1], 1 - xyxy[..., 0], xyxy[..., 3]], axis=-1)
    return np.where(flip[..., None], mirrored, xyxy)
