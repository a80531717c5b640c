"""What RefShapes-VLM is taught by: heads that are thrown away after training, soft targets for coordinates, and
confidences that say how sure the pointer is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.build import NUMBERS, WIDTH, confidence_tokens
from vlm.questions import PREFIX, SURE, Lessons, Seen
from vlm.scenes import ATTRIBUTES

BOX_WEIGHT = 5.0  # brings errors of some hundredths of the image to the scale of a cross-entropy
BLUR = 1.5  # percent: spread of a coordinate's soft target, since 41 is nearly as good as 40


class TowerHeads(nn.Module):
    """What a patch's token must tell: attributes of its object, and the object's box."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(WIDTH, 1 + len(values)) for values in ATTRIBUTES.values())
        self.box = nn.Linear(WIDTH, 4)

    def forward(self, patches: Tensor, seen: Seen) -> tuple[Tensor, dict[str, float]]:
        """Patches [B, P, WIDTH] -> loss, and accuracies and mean error of boxes on patches of objects."""
        there = seen.attributes[..., 0] > 0
        total, told = patches.new_zeros((), dtype=torch.float32), {}
        for k, (name, head) in enumerate(zip(ATTRIBUTES, self.attributes, strict=True)):
            logits = head(patches).float()
            total = total + F.cross_entropy(logits.flatten(0, 1), seen.attributes[..., k].flatten())
            told[name] = float((logits.argmax(-1) == seen.attributes[..., k])[there].float().mean())
        error = (self.box(patches).float() - seen.xyxy)[there].abs().mean()
        told["box_error"] = float(error.detach())
        return total + BOX_WEIGHT * error, told


class Pointer(nn.Module):
    """Which patches the token before the box means: a short cut for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, lessons: Lessons) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, L, WIDTH] -> loss; how sure each question's choice is; is it right? Both [Q].

        It chooses the object of its best patch, and is as sure as the shares of all patches of that object add up to.
        """
        row, place = lessons.joint.unbind(1)
        keys = self.key(hidden[:, 1:PREFIX])[row]
        scores = (keys @ self.query(hidden[row, place])[:, :, None])[..., 0].float() / math.sqrt(WIDTH)
        pointed = (lessons.object_of == lessons.target[:, None]).float()
        wanted = pointed / pointed.sum(-1, keepdim=True).clamp(min=1)
        loss = -(wanted * F.log_softmax(scores, -1)).sum(-1).mean()
        chosen = lessons.object_of.gather(1, scores.argmax(-1, keepdim=True))
        sure = (scores.detach().softmax(-1) * (lessons.object_of == chosen)).sum(-1)
        return loss, sure * (chosen[:, 0] >= 0), chosen[:, 0] == lessons.target


class Responses(nn.Module):
    """Cross-entropy of the responses' tokens; of coordinates, with targets that are blurred."""

    row_of: Tensor
    soft: Tensor
    tenths: Tensor

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        super().__init__()
        numbers = torch.arange(len(NUMBERS))
        blurred = torch.exp(-((numbers[:, None] - numbers[None, :]) ** 2) / (2 * BLUR**2))
        row_of = torch.full((vocabulary,), -1, dtype=torch.int64)
        soft = torch.zeros(2 * len(NUMBERS), vocabulary)
        for half, end in enumerate(("", ",")):  # a number, and a number with the comma behind it
            tokens = torch.tensor([tokenizer.encode(f"{number}{end}")[0] for number in NUMBERS])
            rows = half * len(NUMBERS) + numbers
            row_of[tokens] = rows
            soft[rows[:, None], tokens[None, :]] = blurred / blurred.sum(-1, keepdim=True)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("soft", soft, persistent=False)
        self.register_buffer("tenths", torch.tensor(confidence_tokens(tokenizer)), persistent=False)

    def with_confidence(self, labels: Tensor, sure: Tensor) -> Tensor:
        """The labels [B, L], with how sure the pointer is of each question [Q], in [0, 1], as confidences."""
        told = self.tenths[(10 * sure).round().long()]
        return labels.masked_scatter(labels == self.tenths[SURE], told)

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, V], labels [B, L] -> mean loss of words, and of coordinates."""
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
        rows = self.row_of[labels]
        is_number = rows >= 0
        words = F.cross_entropy(logits[~is_number], labels[~is_number])
        return words, F.cross_entropy(logits[is_number], self.soft[rows[is_number]])
