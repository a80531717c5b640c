"""Parser of generated sentences: the words -> what they ask for.

sentence = ["the"] {pick} (noun | ["one"] "of the" number nouns) {tail} [picture]
pick     = side | "leftmost" | vertical side | "second" | "middle" | "biggest" | "bigger" | "closest"
tail     = "on the left" ["side"] | "at the top" | "in the top left corner" | "in the middle" | "from the left"
         | "closest to the camera" | ["that is"] relation | "and" tail
relation = ("to the left of" | "next to" | ...) "the" noun | "between the" noun "and the" noun
         | "between the two" nouns
"""

from __future__ import annotations

from dataclasses import dataclass, field

from l2l_core.datasets.sentences import words as w
from l2l_core.datasets.sentences.words import Vocabulary


@dataclass(frozen=True)
class Pick:
    """A choice among the objects of a group. name: side, corner, rank, middle, size or depth."""

    name: str
    side: str = ""  # left, right, top, bottom; `top left`; big, small; near, far
    rank: int = 1


@dataclass(frozen=True)
class Relation:
    """What must hold between an object and other ones. anchors: their kinds; twice the same: the two of a kind."""

    name: str
    anchors: tuple[str, ...]


@dataclass
class Query:
    """All parts must agree on one object. count: how many objects of the kind there are, if the sentence says so."""

    kind: str = ""
    count: int | None = None
    picks: list[Pick] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)


def parse(sentence: str, vocabulary: Vocabulary) -> Query:
    """The query of a sentence. Raises ValueError if the grammar above does not cover it."""
    return _Parser(sentence, vocabulary).query()


class _Parser:
    def __init__(self, sentence: str, vocabulary: Vocabulary) -> None:
        self.words, self.at, self.vocabulary = tuple(sentence.split()), 0, vocabulary
        self.found, self.rank = Query(), 0

    def take(self, *phrases: str) -> str:
        """Consume and return the first of the phrases that comes next; "" if none does."""
        for phrase in phrases:
            length = len(phrase.split())
            if " ".join(self.words[self.at : self.at + length]) == phrase:
                self.at += length
                return phrase
        return ""

    def need(self, *phrases: str) -> str:
        if not (taken := self.take(*phrases)):
            raise self.failure(" or ".join(phrases[:4]))
        return taken

    def failure(self, expected: str) -> ValueError:
        found = repr(self.words[self.at]) if self.at < len(self.words) else "the end"
        return ValueError(f"{' '.join(self.words)!r}: found {found}, expected {expected}")

    def noun(self) -> str:
        """Consume the longest noun that comes next, and return its kind; "" if none does."""
        for length in range(self.vocabulary.longest, 0, -1):
            phrase = " ".join(self.words[self.at : self.at + length])
            if len(phrase.split()) == length and phrase in self.vocabulary.meanings:
                self.at += length
                return self.vocabulary.meanings[phrase]
        return ""

    def need_noun(self) -> str:
        if not (kind := self.noun()):
            raise self.failure("a noun")
        return kind

    def query(self) -> Query:
        self.take("the")
        while not (kind := self.noun()):
            if self.take("one of the", "of the"):
                self.found.count = w.NUMBERS[self.need(*w.NUMBERS)]
                kind = self.need_noun()
                break
            self.pick()
        self.found.kind = kind
        while self.at < len(self.words):
            if not self.take(*w.PICTURE):
                self.tail()
        if self.rank:
            raise self.failure("'from the' and a side")
        return self.found

    def add(self, name: str, side: str = "", rank: int = 1) -> None:
        self.found.picks.append(Pick(name, side, rank))

    def pick(self) -> None:
        """One word before the noun; two for a corner."""
        if word := self.take(*w.VERTICAL):
            horizontal = self.take("left", "right")
            if not horizontal and word not in w.SIDES:
                raise self.failure("left or right")
            self.add("corner" if horizontal else "side", f"{w.VERTICAL[word]} {horizontal}".strip())
        elif word := self.take(*w.SIDES):
            self.add("side", word)
        elif word := self.take(*w.FARTHEST):
            self.add("rank", w.FARTHEST[word])
        elif word := self.take(*w.RANKS):
            self.rank = w.RANKS[word]
        elif self.take(*w.MIDDLE):
            self.add("middle")
        elif word := self.take(*w.SIZES):
            self.add("size", w.SIZES[word])
        elif word := self.take(*w.SIZES_OF_TWO):
            self.found.count = 2
            self.add("size", w.SIZES_OF_TWO[word])
        elif word := self.take(*w.DEPTHS):
            self.add("depth", w.DEPTHS[word])
        else:
            raise self.failure("a noun, a place or a size")

    def tail(self) -> None:
        self.take("and")
        self.take("that is")
        if self.rank and self.take("from the", "from"):
            self.add("rank", self.need(*w.SIDES), self.rank)
            self.rank = 0
        elif self.take("between the"):
            if self.take("two"):
                self.found.relations.append(Relation("between", (self.need_noun(),) * 2))
            else:
                first = self.need_noun()
                self.need("and the")
                self.found.relations.append(Relation("between", (first, self.need_noun())))
        elif not (self.place() or self.camera() or self.relation()):
            raise self.failure("a place or a relation")

    def place(self) -> bool:
        start = self.at
        self.take("on the", "at the", "in the", "on")
        if vertical := self.take(*w.VERTICAL):
            horizontal = self.take("left", "right")
            if horizontal:
                self.need("corner")
            self.add("corner" if horizontal else "side", f"{w.VERTICAL[vertical]} {horizontal}".strip())
        elif self.at > start and (side := self.take("left", "right")):
            self.take("side")
            self.add("side", side)
        elif self.at > start and self.take(*w.MIDDLE):
            self.add("middle")
        else:
            self.at = start
            return False
        return True

    def camera(self) -> bool:
        start = self.at
        if (word := self.take(*w.DEPTHS)) and self.take(*w.CAMERA):
            self.add("depth", w.DEPTHS[word])
            return True
        self.at = start
        return False

    def relation(self) -> bool:
        if not (words := self.take(*w.RELATIONS)):
            return False
        self.need("the")
        self.found.relations.append(Relation(w.RELATIONS[words], (self.need_noun(),)))
        return True
