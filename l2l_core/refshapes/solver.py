"""Finds the object that a sentence refers to, from the words and the masks, independent of the generator.

Every test has three outcomes: sure, impossible, or too close to call. A sentence has a solution only if exactly one
object surely fits and every other surely does not, so that no solution depends on a single pixel.

    sentence    = [opener] phrase
    phrase      = ["the" | "a"] {adjective | place | rank} noun {"with" texture | "without" texture | place | relation
                  | "from the" side | "that is" complement {"and" ["is"] complement}}
    complement  = ["not"] (adjective | "a" shape) | "neither" adjective "nor" adjective | place | relation
    relation    = ("left of" | "above" | "next to" | "closest to" | ...) anchor
    anchor      = ["the" | "a"] {adjective} noun ["with" texture | "without" texture]      (must be one object)

Adjectives and relations are filters. Places ("left", "top right"), ranks ("second ... from the left") and superlatives
choose among the objects that pass all filters, regardless of word order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.core.verdict import Verdict
from l2l_core.refshapes.scene import SceneObject

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
}
COLOR_WORDS = {name: (name,) for name in ("red", "yellow", "green", "blue", "white")} | {"purple": ("purple", "violet")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}
TEXTURE_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "outlined": ("outlined", "framed"),
}
TEXTURE_NOUNS = {"striped": ("stripes",), "dotted": ("dots", "spots"), "outlined": ("a border", "a frame")}
ANY_WORDS = ("one", "shape", "object", "thing")
RANK_WORDS = {2: ("second",), 3: ("third",)}
SIDE_WORDS = {"left": ("left",), "right": ("right",), "top": ("top",), "bottom": ("bottom",)}
EXTREME_WORDS = {"left": ("leftmost",), "right": ("rightmost",), "top": ("topmost", "highest"), "bottom": ("lowest",)}
GROWTH_WORDS = {"big": ("biggest", "largest"), "small": ("smallest",)}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under", "beneath"),
    "next": ("next to", "beside"),
    "closest": ("closest to", "nearest to"),
}
OPENERS = ("find", "pick", "look for", "it is", "i mean")
FILLERS = ("located", "placed", "sitting")

SIDES_XY = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}

# Margins; lengths are shares of the image side (0.1 is 10 pixels of 96). Between sure and impossible is undecided.
RANK_MARGIN = 0.07  # centers this far apart have a clear order
SIDE_MARGIN = 0.15  # "left" needs a clear lead over the others
HALF_SURE, HALF_POSSIBLE = 0.41, 0.55  # "left" means a center left of the first, never right of the second
CORNER_POSSIBLE = 0.48  # an object at the exact center is in no corner
MIDDLE_SURE, MIDDLE_POSSIBLE = 0.14, 0.22  # offset from the image's center, per axis
BESIDE_SURE, BESIDE_POSSIBLE = 0.07, 0.16  # free space between neighbors
DIRECTION_SURE, DIRECTION_POSSIBLE = 0.10, 0.03  # offset between centers; sure also requires the longer axis
SMALL_BELOW, BIG_ABOVE = 0.25, 0.29  # geometric mean of a box's sides; no object is drawn in the gap between them
SIZE_RATIO = 1.3  # the biggest is at least this many times as long as the runner-up
CLOSEST_RATIO = 1.5  # the runner-up is at least this many times as far
CLOSEST_OFFSET = 0.03  # added to distances, so that touching and nearly touching objects tie


@dataclass(frozen=True)
class World:
    """Measurements: attributes [N]; center_xy [N, 2], extent [N] and free space gap [N, N] in image sides."""

    shape: NDArray[np.str_]
    color: NDArray[np.str_]
    texture: NDArray[np.str_]
    center_xy: NDArray[np.float64]
    extent: NDArray[np.float64]
    gap: NDArray[np.float64]


def measure(objects: Sequence[SceneObject], masks: NDArray[np.bool_]) -> World:
    """Measure visible masks [N, S, S]; every object needs a pixel. Sizes come from the masks, not the objects."""
    side = masks.shape[-1]
    centres, extents = np.empty((len(masks), 2)), np.empty(len(masks))
    gaps = np.zeros((len(masks), len(masks)))
    for index, mask in enumerate(masks):
        ys, xs = np.nonzero(mask)
        centres[index] = (xs.mean() + 0.5) / side, (ys.mean() + 0.5) / side
        extents[index] = np.sqrt((np.ptp(xs) + 1) * (np.ptp(ys) + 1)) / side
        away_px = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        gaps[index] = [away_px[other].min() / side for other in masks]
    return World(
        shape=np.array([o.shape for o in objects]),
        color=np.array([o.color for o in objects]),
        texture=np.array([o.texture for o in objects]),
        center_xy=centres,
        extent=extents,
        gap=gaps,
    )


def solve(sentence: str, world: World) -> int | None:
    """Index of the one object that the sentence refers to; None if none, several or an unclear number fit.

    Raises ValueError if the sentence does not match the grammar above.
    """
    return _Reader(sentence.split(), world).sentence().only()


def _meanings(words: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: meaning for meaning, synonyms in words.items() for word in synonyms}


_SHAPE, _COLOR, _SIZE = _meanings(SHAPE_WORDS), _meanings(COLOR_WORDS), _meanings(SIZE_WORDS)
_TEXTURE, _SIDE = _meanings(TEXTURE_WORDS), _meanings(SIDE_WORDS)
_EXTREME, _GROWTH = _meanings(EXTREME_WORDS), _meanings(GROWTH_WORDS)
_RANK = {word: rank for rank, words in RANK_WORDS.items() for word in words}
_RELATION = {tuple(phrase.split()): name for name, phrases in RELATIONS.items() for phrase in phrases}
_VERTICAL = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}


@dataclass
class _Phrase:
    """The state of a phrase: a filter, and choices among the objects that pass it."""

    passing: Verdict
    choices: list[Callable[[Verdict], Verdict]] = field(default_factory=list)
    rank: int | None = None


class _Reader:
    """Recursive-descent parser that evaluates the words as it reads."""

    def __init__(self, words: Sequence[str], world: World) -> None:
        self.words, self.at, self.world = tuple(words), 0, world

    # --- words ---

    def peek(self, count: int = 1) -> tuple[str, ...]:
        return self.words[self.at : self.at + count]

    def take(self, *phrases: str) -> bool:
        """Consume the first of the phrases that matches the next words."""
        for phrase in phrases:
            wanted = tuple(phrase.split())
            if self.peek(len(wanted)) == wanted:
                self.at += len(wanted)
                return True
        return False

    def lookup(self, *tables: dict[str, str]) -> str | None:
        """Consume the next word if a table contains it, and return its meaning."""
        word = self.peek()
        for table in tables:
            if word and word[0] in table:
                self.at += 1
                return table[word[0]]
        return None

    def fail(self, expected: str) -> ValueError:
        found = repr(self.words[self.at]) if self.at < len(self.words) else "the end"
        return ValueError(f"{' '.join(self.words)!r}: found {found}, expected {expected}")

    # --- grammar ---

    def sentence(self) -> Verdict:
        self.take(*OPENERS)
        phrase = self.head(_Phrase(self.everything()), places=True)
        while self.at < len(self.words):
            self.tail(phrase)
        return self.choose(phrase)

    def head(self, phrase: _Phrase, places: bool) -> _Phrase:
        """[article] {adjective | place | rank} noun; an anchor (places=False) has adjectives only."""
        self.take("the", "a")
        while True:
            if (adjective := self.adjective()) is not None:
                phrase.passing &= adjective
            elif places and self.place(phrase):
                pass
            elif places and self.peek() and self.peek()[0] in _RANK and phrase.rank is None:
                phrase.rank = _RANK[self.words[self.at]]
                self.at += 1
            elif shape := self.lookup(_SHAPE):
                phrase.passing &= self.exactly(self.world.shape == shape)
                return phrase
            elif self.take(*ANY_WORDS):
                return phrase
            else:
                raise self.fail("an adjective or a noun")

    def tail(self, phrase: _Phrase) -> None:
        """One modifier after the noun."""
        self.take(*FILLERS)
        if self.texture_tail(phrase) or self.relation(phrase):
            return
        if phrase.rank is not None and self.take("from the"):
            if (side := self.lookup(_SIDE)) is None:
                raise self.fail("a side")
            phrase.choices.append(partial(self.ranked_from, side, phrase.rank))
            phrase.rank = None
        elif self.take("that is"):
            self.complement(phrase)
            while self.take("and is", "and"):
                self.complement(phrase)
        elif not self.place(phrase):
            raise self.fail("a place, a relation or 'that is'")

    def complement(self, phrase: _Phrase) -> None:
        self.take(*FILLERS)
        if self.take("neither"):
            phrase.passing &= ~self.quality()
            if not self.take("nor"):
                raise self.fail("'nor'")
            phrase.passing &= ~self.quality()
        elif self.take("not"):
            phrase.passing &= ~self.quality()
        elif not (self.relation(phrase) or self.place(phrase)):
            phrase.passing &= self.quality()

    def quality(self) -> Verdict:
        """An adjective or `a SHAPE`."""
        if self.take("a"):
            if (shape := self.lookup(_SHAPE)) is None:
                raise self.fail("a shape")
            return self.exactly(self.world.shape == shape)
        if (adjective := self.adjective()) is None:
            raise self.fail("an adjective")
        return adjective

    def adjective(self) -> Verdict | None:
        if color := self.lookup(_COLOR):
            return self.exactly(self.world.color == color)
        if texture := self.lookup(_TEXTURE):
            return self.exactly(self.world.texture == texture)
        if size := self.lookup(_SIZE):
            small = Verdict(self.world.extent <= SMALL_BELOW, self.world.extent < BIG_ABOVE)
            return small if size == "small" else ~small
        return None

    def texture_tail(self, phrase: _Phrase) -> bool:
        without = self.take("without")
        if not (without or self.take("with")):
            return False
        texture = next((name for name, nouns in TEXTURE_NOUNS.items() if self.take(*nouns)), None)
        if texture is None:
            raise self.fail("stripes, dots or a border")
        having = self.exactly(self.world.texture == texture)
        phrase.passing &= ~having if without else having
        return True

    def place(self, phrase: _Phrase) -> bool:
        """`left`, `on the left side`, `top right`, `in the lower left corner`, `in the middle`, `largest`."""
        start = self.at
        self.take("on the", "at the", "in the")
        if self.take("middle", "center"):
            phrase.choices.append(self.in_middle)
        elif vertical := self.lookup(_VERTICAL):
            horizontal = next((name for name in ("left", "right") if self.take(name)), None)
            if horizontal is not None:
                phrase.choices.append(partial(self.in_corner, horizontal, vertical))
                self.take("corner")
            elif self.words[self.at - 1] == vertical:
                phrase.choices.append(partial(self.on_side, vertical))
                self.take("side")
            else:
                raise self.fail("left or right")
        elif side := self.lookup(_SIDE):
            phrase.choices.append(partial(self.on_side, side))
            self.take("side")
        elif start == self.at and (side := self.lookup(_EXTREME)):
            phrase.choices.append(partial(self.ranked_from, side, 1))
        elif start == self.at and (growth := self.lookup(_GROWTH)):
            phrase.choices.append(partial(self.most_grown, growth))
        elif start == self.at:
            return False
        else:
            raise self.fail("a place")
        return True

    def relation(self, phrase: _Phrase) -> bool:
        for length in (4, 2, 1):
            if (name := _RELATION.get(self.peek(length))) is not None:
                self.at += length
                break
        else:
            return False
        described = self.head(_Phrase(self.everything()), places=False)
        self.texture_tail(described)
        anchor = described.passing.only()
        if anchor is None:  # without a unique anchor, the relation is surely true of no object
            phrase.passing = Verdict(phrase.passing.sure & False, phrase.passing.possible)
            return True
        phrase.passing &= self.other_than(anchor)
        if name == "closest":
            phrase.choices.append(partial(self.closest_to, anchor))
        elif name == "next":
            gap = self.world.gap[anchor]
            phrase.passing &= Verdict(gap <= BESIDE_SURE, gap <= BESIDE_POSSIBLE)
        else:
            phrase.passing &= self.direction(name, anchor)
        return True

    # --- meaning ---

    def exactly(self, fits: NDArray[np.bool_]) -> Verdict:
        return Verdict(fits, fits)

    def everything(self) -> Verdict:
        return self.exactly(np.ones(len(self.world.extent), dtype=bool))

    def other_than(self, index: int) -> Verdict:
        return self.exactly(np.arange(len(self.world.extent)) != index)

    def direction(self, name: str, anchor: int) -> Verdict:
        sign_x, sign_y = SIDES_XY[{"above": "top", "below": "bottom"}.get(name, name)]
        offset = self.world.center_xy - self.world.center_xy[anchor]
        ahead = offset @ np.array([sign_x, sign_y])
        aside = np.abs(offset @ np.array([sign_y, sign_x]))
        return Verdict((ahead >= DIRECTION_SURE) & (ahead > aside), ahead >= DIRECTION_POSSIBLE)

    def choose(self, phrase: _Phrase) -> Verdict:
        """Make every choice among all objects that pass the filters, so that the order of choices does not matter."""
        if phrase.rank is not None:
            raise self.fail("'from the' and a side")
        chosen = phrase.passing
        for choice in phrase.choices:
            chosen &= choice(phrase.passing)
        return chosen

    def on_side(self, side: str, group: Verdict) -> Verdict:
        """In that half of the image, and clearly ahead of the rest of the group."""
        position = self.toward(side)
        in_half = Verdict(position <= HALF_SURE, position <= HALF_POSSIBLE)
        return in_half & self.ranked(group, position, 1, SIDE_MARGIN)

    def in_corner(self, horizontal: str, vertical: str, group: Verdict) -> Verdict:
        position = np.maximum(self.toward(horizontal), self.toward(vertical))
        return group & Verdict(position <= HALF_SURE, position <= CORNER_POSSIBLE)

    def in_middle(self, group: Verdict) -> Verdict:
        off = np.abs(self.world.center_xy - 0.5).max(axis=1)
        return group & Verdict(off <= MIDDLE_SURE, off <= MIDDLE_POSSIBLE)

    def ranked_from(self, side: str, rank: int, group: Verdict) -> Verdict:
        return self.ranked(group, self.toward(side), rank, RANK_MARGIN)

    def most_grown(self, size: str, group: Verdict) -> Verdict:
        length = np.log(self.world.extent)
        return self.ranked(group, -length if size == "big" else length, 1, float(np.log(SIZE_RATIO)))

    def closest_to(self, anchor: int, group: Verdict) -> Verdict:
        distance = np.log(self.world.gap[anchor] + CLOSEST_OFFSET)
        return self.ranked(group, distance, 1, float(np.log(CLOSEST_RATIO)))

    def toward(self, side: str) -> NDArray[np.float64]:
        """Distance of the centers from that side of the image, 0..1."""
        sign = np.array(SIDES_XY[side])
        position = self.world.center_xy @ np.abs(sign)
        return np.asarray(position if sign.sum() < 0 else 1 - position)

    def ranked(self, group: Verdict, values: NDArray[np.float64], rank: int, margin: float) -> Verdict:
        """The rank-th smallest of the group; values closer than the margin have no clear order."""
        lead = values[:, None] - values[None, :]  # [i, j] > 0: j comes before i
        others = ~np.eye(len(values), dtype=bool)
        surely_before = ((lead >= margin) & group.sure & others).sum(axis=1)
        possibly_before = ((lead > -margin) & group.possible & others).sum(axis=1)
        return Verdict(
            group.sure & (surely_before == rank - 1) & (possibly_before == rank - 1),
            group.possible & (surely_before <= rank - 1) & (possibly_before >= rank - 1),
        )
