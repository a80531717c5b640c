"""Random natural sentences about a scene's object; they are meant to be true, and the solver checks them later.

Three styles: short (terse, places allowed), attribute (no places), long (full phrases with relations, negation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from l2l_core.refshapes import solver as words
from l2l_core.refshapes.scene import SceneObject
from l2l_core.refshapes.solver import World

STYLES = ("short", "attribute", "long")

MAIN_WORD_SHARE = 0.75  # the first synonym is the usual one
OPENER_SHARE = 0.15
FILLER_SHARE = 0.4  # relations after `sitting`, `located` or nothing instead of `that is`
GENERIC_NOUN_SHARE = 0.2  # "the red one" instead of "the red star"
FULL = (0.1, 0.5, 0.3, 0.1)  # shares of 0, 1, 2, 3 adjectives in a phrase with nothing else ...
BRIEF = (0.4, 0.5, 0.1, 0.0)  # ... and in a phrase with a place or a relation, which needs fewer


def say(index: int, objects: Sequence[SceneObject], world: World, style: str, rng: np.random.Generator) -> str:
    """A random sentence of a style for objects[index]; it may also fit other objects."""
    speaker = _Speaker(index, objects, world, rng)
    match style:
        case "short":
            forms: dict[Callable[[], str], float] = {
                speaker.bare: 0.2,
                speaker.with_place: 0.5,
                speaker.with_rank: 0.15,
                speaker.with_extreme: 0.15,
            }
        case "attribute":
            forms = {speaker.bare: 0.5, speaker.with_texture: 0.2, speaker.negated: 0.2, speaker.grown: 0.1}
        case _:
            forms = {speaker.related: 0.6, speaker.related_and: 0.25, speaker.placed_and_negated: 0.15}
    form = list(forms)[int(rng.choice(len(forms), p=list(forms.values())))]
    return form()


class _Speaker:
    """Chooses words for one object."""

    def __init__(self, index: int, objects: Sequence[SceneObject], world: World, rng: np.random.Generator) -> None:
        self.index, self.objects, self.world, self.rng = index, objects, world, rng

    # --- words ---

    def pick(self, options: Sequence[str]) -> str:
        """The first option most of the time, else a random one."""
        if len(options) == 1 or self.rng.random() < MAIN_WORD_SHARE:
            return options[0]
        return options[int(self.rng.integers(1, len(options)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def any_of(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def noun_phrase(self, index: int, counts: Sequence[float] = FULL, skip: str = "") -> str:
        """Adjectives and a noun; `skip` names an attribute to omit."""
        item = self.objects[index]
        said = {
            "size": self.pick(words.SIZE_WORDS[item.size]),
            "color": self.pick(words.COLOR_WORDS[item.color]),
            "texture": self.pick(words.TEXTURE_WORDS[item.texture]),
        }
        said.pop(skip, None)
        weights = {"size": 0.3, "color": 0.5, "texture": 0.2}  # people name colors first
        share = np.array([weights[key] for key in said])
        count = min(int(self.rng.choice(len(counts), p=counts)), len(said))
        generic = skip == "shape" or self.chance(GENERIC_NOUN_SHARE)
        chosen = self.rng.choice(list(said), size=count, replace=False, p=share / share.sum())
        noun = self.pick(words.ANY_WORDS) if generic else self.pick(words.SHAPE_WORDS[item.shape])
        return " ".join([said[key] for key in said if key in chosen] + [noun])

    def the(self, phrase: str) -> str:
        opener = self.any_of(words.OPENERS) + " " if self.chance(OPENER_SHARE) else ""
        return f"{opener}the {phrase}"

    # --- places of the target ---

    def sides(self) -> list[str]:
        """Sides of the image where the target is, clearest first; empty in the middle."""
        x, y = self.world.center_xy[self.index]
        off = {"left": 0.5 - x, "right": x - 0.5, "top": 0.5 - y, "bottom": y - 0.5}
        ordered = sorted(off, key=lambda side: -off[side])
        return [side for side in ordered if off[side] >= 0.5 - words.HALF_SURE]

    def place(self) -> tuple[str, str]:
        """An adjective and an adverb of place, such as `top left` and `in the top left corner`."""
        sides = self.sides()
        if not sides:
            return "center", self.any_of(("in the middle", "in the center"))
        if len(sides) > 1 and self.chance(0.5):
            vertical, horizontal = sorted(sides[:2], key=lambda side: side in ("left", "right"))
            if self.chance(0.3):
                vertical = {"top": "upper", "bottom": "lower"}.get(vertical, vertical)
            corner = f"{vertical} {horizontal}"
            return corner, self.any_of((corner, f"in the {corner}", f"in the {corner} corner"))
        side = self.any_of(sides)
        preposition = "on the" if side in ("left", "right") else "at the"
        return side, self.any_of((side, f"{preposition} {side}", f"on the {side} side"))

    # --- forms ---

    def bare(self) -> str:
        phrase = self.noun_phrase(self.index)
        return f"the {phrase}" if self.chance(0.3) else phrase

    def with_place(self) -> str:
        before, after = self.place()
        phrase = self.noun_phrase(self.index, BRIEF)
        if self.chance(0.45):
            return f"{before} {phrase}"
        return f"{phrase} {after}"

    def with_rank(self) -> str:
        """The rank among objects of the same noun phrase is unknown here: guess, and let the solver check."""
        side = self.any_of(tuple(words.SIDE_WORDS))
        rank = self.pick(words.RANK_WORDS[2 if self.chance(0.8) else 3])
        return f"{rank} {self.noun_phrase(self.index, BRIEF)} from the {side}"

    def with_extreme(self) -> str:
        side = self.any_of(self.sides() or ["left"])
        return f"{self.pick(words.EXTREME_WORDS[side])} {self.noun_phrase(self.index, BRIEF)}"

    def with_texture(self) -> str:
        """`red star with dots`, `star without stripes`."""
        own = self.objects[self.index].texture
        phrase = self.noun_phrase(self.index, skip="texture")
        if own != "plain" and self.chance(0.6):
            return f"{phrase} with {self.pick(words.TEXTURE_NOUNS[own])}"
        rivals = [o.texture for o in self.objects if o.texture not in (own, "plain")]
        return f"{phrase} without {self.pick(words.TEXTURE_NOUNS[self.any_of(rivals)])}" if rivals else self.bare()

    def grown(self) -> str:
        superlative = self.pick(words.GROWTH_WORDS[self.objects[self.index].size])
        return f"{superlative} {self.noun_phrase(self.index, BRIEF, skip='size')}"

    def negation(self) -> tuple[str, str]:
        """An attribute, and a negation that excludes another object of the scene by this attribute."""
        target = self.objects[self.index]
        tables: dict[str, Mapping[str, tuple[str, ...]]] = {
            "shape": words.SHAPE_WORDS,
            "color": words.COLOR_WORDS,
            "size": words.SIZE_WORDS,
            "texture": words.TEXTURE_WORDS,
        }
        kind = str(self.rng.choice(list(tables), p=(0.2, 0.4, 0.15, 0.25)))
        rivals = sorted({getattr(o, kind) for o in self.objects} - {getattr(target, kind)})
        if not rivals:
            return "", ""
        article = "a " if kind == "shape" else ""
        if kind != "size" and len(rivals) > 1 and self.chance(0.3):
            first, second = self.rng.choice(rivals, size=2, replace=False)
            said = [article + self.pick(tables[kind][str(name)]) for name in (first, second)]
            return kind, f"neither {said[0]} nor {said[1]}"
        return kind, f"not {article}{self.pick(tables[kind][self.any_of(rivals)])}"

    def negated(self) -> str:
        kind, remark = self.negation()
        if not remark:
            return self.bare()
        return f"the {self.noun_phrase(self.index, BRIEF, skip=kind)} that is {remark}"

    def placed_and_negated(self) -> str:
        kind, remark = self.negation()
        _, place = self.place()
        if not remark or " " not in place:
            return self.related()
        return self.the(f"{self.noun_phrase(self.index, BRIEF, skip=kind)} {place} that is {remark}")

    def anchor(self, avoid: int = -1) -> int:
        """Another object as the anchor of a relation, often a neighbor."""
        others = [k for k in range(len(self.objects)) if k not in (self.index, avoid)]
        gaps = self.world.gap[self.index]
        return min(others, key=lambda k: gaps[k]) if self.chance(0.4) else others[int(self.rng.integers(len(others)))]

    def relation(self, anchor: int) -> str:
        """The target's relation to another object, such as `to the left of the big red star`."""
        dx, dy = self.world.center_xy[self.index] - self.world.center_xy[anchor]
        name = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        if self.chance(0.15):
            name = "next" if self.world.gap[self.index, anchor] <= words.BESIDE_SURE else "closest"
        return f"{self.pick(words.RELATIONS[name])} the {self.noun_phrase(anchor)}"

    def related(self) -> str:
        link = self.any_of(("", *words.FILLERS)) if self.chance(FILLER_SHARE) else "that is"
        said = (self.noun_phrase(self.index, BRIEF), link, self.relation(self.anchor()))
        return self.the(" ".join(filter(None, said)))

    def related_and(self) -> str:
        """Two relations, or a negation and a relation."""
        first = self.anchor()
        if self.chance(0.4):
            relations = f"{self.relation(first)} and {self.relation(self.anchor(avoid=first))}"
            return self.the(f"{self.noun_phrase(self.index, BRIEF)} that is {relations}")
        kind, remark = self.negation()
        if not remark:
            return self.related()
        return self.the(
            f"{self.noun_phrase(self.index, BRIEF, skip=kind)} that is {remark} and is {self.relation(first)}"
        )
