"""Words of generated sentences: all that the generator and the solver share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

STYLES = ("refcoco", "refcoco+", "refcocog")
"""Short with places; short without any place in the image; longer, with relations."""

SIDES = ("left", "right", "top", "bottom")
FARTHEST = {"leftmost": "left", "rightmost": "right", "topmost": "top"}
VERTICAL = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
RANKS = {"second": 2, "third": 3, "fourth": 4, "2nd": 2, "3rd": 3}
NUMBERS = {"two": 2, "three": 3, "four": 4}
MIDDLE = ("middle", "center")
SIZES = {"biggest": "big", "largest": "big", "smallest": "small"}
SIZES_OF_TWO = {"bigger": "big", "larger": "big", "smaller": "small"}
DEPTHS = {"closest": "near", "nearest": "near", "farthest": "far", "furthest": "far"}
PICTURE = ("in the image", "in the picture", "in the photo", "of the image", "of the picture", "of the photo")
CAMERA = ("to the camera", "from the camera")
RELATIONS = {
    "to the left of": "left",
    "to the right of": "right",
    "left of": "left",
    "right of": "right",
    "next to": "next",
    "beside": "next",
    "closest to": "nearest",
    "nearest to": "nearest",
    "with": "with",
    "on": "on",
}

SPOKEN = {
    "airplane": ("plane",),
    "baseball glove": ("glove",),
    "bicycle": ("bike",),
    "cell phone": ("phone",),
    "couch": ("sofa",),
    "hair drier": ("hair dryer",),
    "motorcycle": ("motorbike",),
    "potted plant": ("plant",),
    "refrigerator": ("fridge",),
    "sports ball": ("ball",),
    "tv": ("television", "screen"),
}
"""What people also call COCO's kinds."""

PEOPLE = ("person", "man", "woman", "boy", "girl", "child", "kid", "baby", "pedestrian", "rider", "player", "human")
LOOKALIKES = (
    PEOPLE,
    ("car", "truck", "bus", "van", "train"),
    ("bicycle", "motorcycle"),
    ("couch", "chair", "bench", "bed"),
    ("cup", "bowl", "wine glass", "glass", "mug", "vase", "bottle"),
    ("fork", "knife", "spoon"),
    ("handbag", "backpack", "suitcase", "bag"),
    ("cow", "sheep", "horse", "dog"),
    ("cake", "sandwich", "pizza", "hot dog", "donut"),
    ("apple", "orange"),
    ("tv", "laptop"),
    ("cell phone", "remote", "mouse"),
    ("skis", "snowboard"),
    ("skateboard", "surfboard", "snowboard"),
    ("microwave", "oven", "toaster"),
    ("potted plant", "vase"),
)
"""Kinds that annotators or readers take for one another in photos: a sentence about one must not fit another."""

COLLECTIVE = frozenset(("people", "crowd", "group", "herd", "flock", "stuff", "other", "object", "objects", "thing"))
"""Names of masks that hold no single object of a kind."""

STANDING = frozenset((*PEOPLE, "bicycle", "car", "motorcycle", "bus", "train", "truck", "van", "bench", "chair", "dog"))
STANDING |= {
    "cat",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "suitcase",
    "couch",
    "fire hydrant",
}
"""Kinds that stand on the ground, where a lower place in the image is closer to the camera."""

CARRIED = frozenset(("backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "kite"))
CARRIED |= {"baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "cell phone", "teddy bear"}
"""What a person can be `with`."""

SEATS = frozenset(("couch", "bed", "bench"))
SITTERS = frozenset((*PEOPLE, "cat", "dog", "teddy bear"))
"""Who can be `on` a seat; other things in front of it or behind it look the same."""

_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice"}
_IRREGULAR |= {"knife": "knives", "sheep": "sheep", "scissors": "scissors", "skis": "skis", "broccoli": "broccoli"}


def kind_of(name: str) -> str:
    """A category's name as words: `traffic_light` and `Traffic Light` are one kind.

    Notes in brackets and characters without a glyph are dropped.
    """
    shown = "".join(letter if letter.isprintable() else " " for letter in name.casefold())
    return " ".join(re.sub(r"\(.*?\)", " ", shown).replace("_", " ").replace("-", " ").split())


def is_plural(noun: str) -> bool:
    """Whether a noun looks like a plural, which nothing counts: `skis`, `grapes`; not `bus`, `glass`."""
    return noun in ("skis", "scissors", "broccoli") or (noun.endswith("s") and not noun.endswith(("ss", "us", "is")))


def plural(noun: str) -> str:
    """The plural of a singular noun."""
    head, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        many = f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{head} {many}".strip()


_PHRASES = (*PICTURE, *CAMERA, *RELATIONS, "on the side corner at from and that is one between of in a")
_SINGLE = (SIDES, FARTHEST, VERTICAL, RANKS, NUMBERS, MIDDLE, SIZES, SIZES_OF_TWO, DEPTHS)
GRAMMAR = frozenset(" ".join(_PHRASES).split()) | {word for words in _SINGLE for word in words}
"""Words with a meaning of their own; a kind whose name holds one of them is not described."""


class Vocabulary:
    """The nouns of a dataset. kinds: names of all its categories, as of `kind_of`, referred to or not."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self.kinds = tuple(sorted(set(kinds)))

    @cached_property
    def meanings(self) -> dict[str, str]:
        """Singular or plural noun -> kind. A word for two kinds means the one with that name."""
        named = [kind for kind in self.kinds if self.can_name(kind)]
        found = {kind: kind for kind in named}
        for kind in named:
            for word in SPOKEN.get(kind, ()):
                found.setdefault(word, kind)
        return {plural(noun): kind for noun, kind in found.items() if not is_plural(noun)} | found

    @cached_property
    def longest(self) -> int:
        """Most words of a noun."""
        return max((len(noun.split()) for noun in self.meanings), default=0)

    def nouns(self, kind: str) -> tuple[str, ...]:
        """The words for a kind, the usual one first."""
        return tuple(noun for noun in (kind, *SPOKEN.get(kind, ())) if self.meanings.get(noun) == kind)

    def can_name(self, kind: str) -> bool:
        """Whether sentences can name a kind: it has a name, of plain words, which means one object."""
        words = kind.split()
        plain = bool(words) and all(re.fullmatch(r"[^\W\d_]+", word) for word in words)
        return plain and not GRAMMAR & set(words) and not COLLECTIVE & set(words)

    @cached_property
    def lookalikes(self) -> dict[str, list[str]]:
        """Kind -> the other kinds that its noun may also fit: listed ones, and those with the same last word."""
        groups = [*LOOKALIKES, *(group for group in self._heads.values() if len(group) > 1)]
        found: dict[str, set[str]] = {kind: set() for kind in self.kinds}
        for group in groups:
            for kind in found.keys() & set(group):
                found[kind] |= set(group) & found.keys() - {kind}
        return {kind: sorted(others) for kind, others in found.items()}

    @cached_property
    def _heads(self) -> dict[str, list[str]]:
        """Last word of a kind, without a plural's s -> kinds."""
        found: dict[str, list[str]] = {}
        for kind in self.kinds:
            found.setdefault(kind.rpartition(" ")[2].removesuffix("s"), []).append(kind)
        return found
