"""Random sentences about annotated objects, each kept only if the solver finds its object.

Proposals look at the centers of boxes only, and are often wrong; the solver decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from l2l_core.core.boxes import iou_xyxy
from l2l_core.datasets.sentences.layout import Layout
from l2l_core.datasets.sentences.solver import solve
from l2l_core.datasets.sentences.words import CARRIED, PEOPLE, SEATS, SITTERS, STYLES, Vocabulary, is_plural, plural

MAIN_WORD_SHARE = 0.7  # the first of several words is the usual one
THE_SHARE = 0.15  # short sentences that begin with `the`
SMALLEST = 0.01  # share of the image; annotators of RefCOCO, too, described few objects below
SLIVER, FRAGMENT = 0.1, 0.02  # an object cut off by a border is at least that wide (or high) and large
IN_PIECES = 0.75  # share of the largest part of a mask, below which it is too hidden, or several objects
SAME_PLACE = 0.5  # IoU of boxes; two such objects of a kind cannot be told apart by places
FEWEST_FORMS_FIRST = ("refcoco+", "refcoco", "refcocog")  # each style leaves its sentence out of the later ones
BORDER = 0.005  # distance from the border of what is cut off

Proposal = tuple[float, str]  # weight, sentence


def describe(index: int, layout: Layout, vocabulary: Vocabulary, rng: np.random.Generator) -> dict[str, str]:
    """Style -> a sentence that the solver finds to mean object `index`; at most one a style, no sentence twice."""
    found: dict[str, str] = {}
    speaker = _Speaker(index, layout, vocabulary, rng)
    for style in FEWEST_FORMS_FIRST:
        proposals = list(speaker.proposals(style))
        order = np.argsort([-(rng.random() ** (1 / weight)) for weight, _ in proposals], kind="stable")
        for choice in order.tolist():
            sentence = proposals[choice][1]
            if sentence.removeprefix("the ") in (said.removeprefix("the ") for said in found.values()):
                continue
            if solve(sentence, layout, vocabulary) == index:
                found[style] = sentence
                break
    return {style: found[style] for style in STYLES if style in found}


def refusal(index: int, layout: Layout, vocabulary: Vocabulary) -> str:
    """Why an object is not described at all; empty if it may be."""
    kind, box = str(layout.kind[index]), layout.box[index]
    alike = np.isin(layout.kind, [kind, *vocabulary.lookalikes[kind]])
    if layout.is_crowd[index]:
        return "crowd"
    if not vocabulary.can_name(kind):
        return "name is no noun for one object"
    if layout.area[index] < SMALLEST:
        return "too small"
    if (alike & layout.is_crowd).any():
        return "its kind is also a crowd"
    width, height = layout.size[index]
    at_side, at_end = box[0] < BORDER or box[2] > 1 - BORDER, box[1] < BORDER or box[3] > 1 - BORDER
    is_fragment = layout.area[index] < FRAGMENT and (at_side or at_end)
    if (at_side and width < SLIVER) or (at_end and height < SLIVER) or is_fragment:
        return "cut off by the border"
    if layout.in_one_piece[index] < IN_PIECES:
        return "in pieces"
    others = alike & (np.arange(len(alike)) != index)
    if (iou_xyxy(box, layout.box[others]) > SAME_PLACE).any():
        return "overlaps another of its kind"
    return ""


class _Speaker:
    """Proposes sentences for one object."""

    def __init__(self, index: int, layout: Layout, vocabulary: Vocabulary, rng: np.random.Generator) -> None:
        self.index, self.layout, self.vocabulary, self.rng = index, layout, vocabulary, rng
        self.kind = str(layout.kind[index])
        self.mates = np.flatnonzero(layout.kind == self.kind)
        self.noun = self.word(self.kind)
        self.countable = not is_plural(self.noun)
        self.x, self.y = layout.center[index]

    def proposals(self, style: str) -> Iterator[Proposal]:
        match style:
            case "refcoco":
                for weight, sentence in self.short():
                    yield weight, f"the {sentence}" if self.rng.random() < THE_SHARE else sentence
            case "refcoco+":
                yield from self.without_places()
            case _:
                yield from self.long()

    # --- words ---

    def pick(self, *options: str) -> str:
        """The first option most of the time, else another one."""
        if len(options) == 1 or self.rng.random() < MAIN_WORD_SHARE:
            return options[0]
        return options[int(self.rng.integers(1, len(options)))]

    def any_of(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]

    def word(self, kind: str) -> str:
        return self.pick(*self.vocabulary.nouns(kind))

    def rank_from(self, side: str) -> int:
        """1 for the first of its kind on that side, by the centers."""
        axis, sign = int(side in ("top", "bottom")), 1 if side in ("left", "top") else -1
        at = sign * self.layout.center[:, axis]
        return 1 + int((at[self.mates] < at[self.index]).sum())

    def size_rank(self) -> int:
        """1 for the largest of its kind."""
        return 1 + int((self.layout.area[self.mates] > self.layout.area[self.index]).sum())

    def sides(self) -> list[str]:
        """Sides on which the object is the first of its kind and in that half."""
        halves = {"left": self.x < 0.5, "right": self.x > 0.5, "top": self.y < 0.5, "bottom": self.y > 0.5}
        return [side for side, inside in halves.items() if inside and self.rank_from(side) == 1]

    def others(self) -> list[int]:
        """Objects that are the only one of another kind, which `the` can name."""
        kinds, counts = np.unique(self.layout.kind, return_counts=True)
        single = [kind for kind in kinds[counts == 1].tolist() if kind != self.kind and self.vocabulary.can_name(kind)]
        return [int(np.flatnonzero(self.layout.kind == kind)[0]) for kind in single]

    # --- styles ---

    def short(self) -> Iterator[Proposal]:
        noun, many = self.noun, len(self.mates)
        if many == 1:
            yield 3, noun
        for side in self.sides():
            if side in ("left", "right"):
                where = self.pick(f"on the {side}", f"on {side}", f"on the {side} side")
                yield 3 if many > 1 else 0.3, self.any_of(f"{side} {noun}", f"{noun} {where}")
            elif many > 1:
                yield 0.8, self.any_of(f"{side} {noun}", f"{noun} at the {side}")
        for side in ("left", "right"):
            rank = self.rank_from(side)
            if many > 1 and rank == 1:
                yield 1, f"{side}most {noun}"
            if many > 2 and rank in (2, 3) and self.countable:
                word = self.any_of(*{2: ("second", "2nd"), 3: ("third", "3rd")}[rank])
                yield 2, f"{word} {noun} from {self.pick('the ', '')}{side}"
        if many > 1:
            corner = f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"
            yield 0.8, self.any_of(f"{corner} {noun}", f"{noun} in the {corner} corner")
        if many == 3 and self.rank_from("left") == 2 and self.countable:
            yield 4, self.any_of(f"middle {noun}", f"{noun} in the middle", f"center {noun}")
        yield from self.sizes(0.5)

    def without_places(self) -> Iterator[Proposal]:
        if len(self.mates) == 1:
            yield 1, f"the {self.noun}"
        yield from self.sizes(1)
        for weight, relation in self.relations(places=False):
            yield weight, f"{self.noun} {relation}"

    def sizes(self, scale: float) -> Iterator[Proposal]:
        noun, many = self.noun, len(self.mates)
        if many == 1 or not self.countable:
            return
        rank = self.size_rank()
        if rank == 1:
            if many > 2:
                yield scale * 2, f"{self.pick('biggest', 'largest')} {noun}"
            yield scale * 2, self.any_of(f"{self.pick('closest', 'nearest')} {noun}", f"{noun} closest to the camera")
        if rank == many:
            if many > 2:
                yield scale, f"smallest {noun}"
            yield scale, self.any_of(f"farthest {noun}", f"{noun} farthest from the camera")
        if many == 2:
            yield scale * 2, f"{self.pick('bigger', 'larger') if rank == 1 else 'smaller'} {noun}"

    def relations(self, places: bool) -> Iterator[Proposal]:
        """Relations to other objects; `places`: also directions."""
        center, kinds = self.layout.center, self.layout.kind
        gaps = self.layout.gap[self.index]
        for other in self.others():
            kind, the = str(kinds[other]), f"the {self.word(str(kinds[other]))}"
            if gaps[other] < 0.05 and self.kind in PEOPLE and kind in CARRIED:
                yield 5, f"with {the}"
            if kind in CARRIED and self.kind not in CARRIED:
                continue  # true of many things, but nobody would say "the truck closest to the backpack"
            if gaps[other] < 0.05:
                yield 3, f"{self.pick('next to', 'beside')} {the}"
                if self.kind in SITTERS and kind in SEATS:
                    yield 4, f"on {the}"
            if gaps[other] < 0.1:
                yield 1, f"{self.pick('closest to', 'nearest to')} {the}"
            if places:
                side = "left" if self.x < center[other, 0] else "right"
                yield 2, f"{self.pick('to the ', '')}{side} of {the}"
        if places:
            yield from self.betweens()

    def betweens(self) -> Iterator[Proposal]:
        center, others = self.layout.center, self.others()
        left = [other for other in others if center[other, 0] < self.x]
        right = [other for other in others if center[other, 0] > self.x]
        for first in left:
            for second in right:
                words = self.word(str(self.layout.kind[first])), self.word(str(self.layout.kind[second]))
                yield 0.7, f"between the {words[0]} and the {words[1]}"
        kinds, counts = np.unique(self.layout.kind, return_counts=True)
        for kind in kinds[counts == 2].tolist():
            noun = self.word(kind) if self.vocabulary.can_name(kind) else ""
            if noun and not is_plural(noun) and kind != self.kind:
                yield 2, f"between the two {plural(noun)}"

    def long(self) -> Iterator[Proposal]:
        noun, many = self.noun, len(self.mates)
        the = f"the {noun}"
        count_word = {2: "two", 3: "three", 4: "four"}.get(many, "")
        picture = f"the {self.any_of('image', 'picture', 'photo')}"
        places: list[str] = []
        for side in self.sides():
            where = f"on the {side} side" if side in ("left", "right") else f"at the {side}"
            places.append(where)
            yield 1.5 if many > 1 else 0.5, f"{the} {where} of {picture}"
            if count_word and self.countable and side in ("left", "right"):
                word = f"{side} one" if many == 2 else f"{side}most"
                yield 1.5, f"the {word} of the {count_word} {plural(noun)}"
        for side in ("left", "right"):
            if many > 2 and self.rank_from(side) in (2, 3) and self.countable:
                word = {2: "second", 3: "third"}[self.rank_from(side)]
                yield 2, f"the {word} {noun} from the {side} in {picture}"
        if many == 3 and self.rank_from("left") == 2 and self.countable:
            yield 3, f"the middle one of the three {plural(noun)}"
        if count_word and self.countable and self.size_rank() in (1, many):
            small = self.size_rank() == many
            words = ("smaller",) if small else ("larger", "bigger")
            if many > 2:
                words = ("smallest",) if small else ("largest", "biggest")
            yield 1.5, f"the {self.any_of(*words)} of the {count_word} {plural(noun)}"
        related = list(self.relations(places=True))
        for weight, relation in related:
            link = "that is " if self.countable and not relation.startswith("with ") and self.rng.random() < 0.5 else ""
            yield weight, f"{the} {link}{relation}"
        yield from self.combined(the, places, related)

    def combined(self, the: str, places: Sequence[str], related: Sequence[Proposal]) -> Iterator[Proposal]:
        """A place and a relation, or two relations."""
        link = "that is" if self.countable else "and"
        for place in places:
            for weight, relation in related:
                if "left" not in relation and "right" not in relation:
                    yield weight / 2, f"{the} {place} {link} {relation}".replace("that is with", "with")
        for first, second in pairwise(related):
            anchors = (relation.rpartition("the ")[2] for _, relation in (first, second))
            if len(set(anchors)) == 2:
                yield first[0] / 2, f"{the} {first[1]} and {second[1]}"
