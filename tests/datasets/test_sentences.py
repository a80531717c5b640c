"""Generated sentences: the solver by hand-made layouts, and the generator by a definition without any margin."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2l_core.core.masks import encode_rle
from l2l_core.datasets.sentences.generator import describe, refusal
from l2l_core.datasets.sentences.layout import Annotated, Layout, measure
from l2l_core.datasets.sentences.query import parse
from l2l_core.datasets.sentences.solver import solve
from l2l_core.datasets.sentences.words import Vocabulary, is_plural, kind_of, plural

WIDTH, HEIGHT = 200, 150
KINDS = ("person", "dog", "cup", "umbrella", "couch", "truck", "car", "skis", "wine glass")
VOCABULARY = Vocabulary(KINDS)

Thing = tuple[str, tuple[int, int, int, int]]  # kind; x1 y1 x2 y2 in pixels


def annotated(thing: Thing, is_crowd: bool = False) -> Annotated:
    kind, (x1, y1, x2, y2) = thing
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return Annotated(kind, encode_rle(mask), is_crowd)


def layout_of(*things: Thing) -> Layout:
    return measure([annotated(thing) for thing in things], HEIGHT, WIDTH)


def at(kind: str, x: int, y: int, width: int = 24, height: int = 24) -> Thing:
    """A box of that size in pixels around a center, as far as it is inside the image."""
    x1, y1 = max(x - width // 2, 0), max(y - height // 2, 0)
    return kind, (x1, y1, min(x + width // 2, WIDTH), min(y + height // 2, HEIGHT))


# --- the solver, by hand

THREE_CUPS = (at("cup", 30, 75), at("cup", 100, 80), at("cup", 170, 75))
TWO_DOGS = (at("dog", 40, 60, 20, 20), at("dog", 130, 100, 60, 60))
SCENE = (
    at("person", 40, 80, 30, 100),  # 0
    at("person", 150, 80, 30, 100),  # 1
    at("umbrella", 40, 50, 26, 30),  # 2, in front of 0
    at("couch", 100, 100, 60, 60),  # 3, 15 px from 0 and 5 px from 1
)


@pytest.mark.parametrize(
    ("things", "sentence", "index"),
    [
        (THREE_CUPS, "left cup", 0),
        (THREE_CUPS, "the cup on the right side of the image", 2),
        (THREE_CUPS, "middle cup", 1),
        (THREE_CUPS, "the middle one of the three cups", 1),
        (THREE_CUPS, "the second cup from the left in the picture", 1),
        (THREE_CUPS, "third cup from right", 0),
        (THREE_CUPS, "cup", None),
        (THREE_CUPS, "the left one of the two cups", None),
        (THREE_CUPS, "top cup", None),
        (THREE_CUPS, "biggest cup", None),
        (THREE_CUPS, "left dog", None),
        (TWO_DOGS, "biggest dog", 1),
        (TWO_DOGS, "the smaller of the two dogs", 0),
        (TWO_DOGS, "dog closest to the camera", 1),
        (TWO_DOGS, "farthest dog", 0),
        ((*TWO_DOGS, at("cup", 70, 60)), "dog closest to the cup", None),  # the other one is not three times as far
        ((at("dog", 30, 100), at("cup", 170, 40)), "dog closest to the cup", None),  # it is the only one, but far
        (TWO_DOGS, "the second dog from the left", None),  # nobody counts two
        (SCENE, "the couch", 3),
        (SCENE, "sofa", 3),
        (SCENE, "person with the umbrella", 0),
        (SCENE, "the person on the left with the umbrella", 0),
        (SCENE, "the person on the right with the umbrella", None),
        (SCENE, "the couch between the two people", 3),
        (SCENE, "the person that is to the right of the sofa", 1),
        (SCENE, "the person next to the couch", None),  # 15 px are neither near nor far
        (SCENE, "the umbrella left of the person", None),  # which person?
        (SCENE[1:], "the couch to the left of the person", 2),
    ],
)
def test_solver_finds_the_object_or_refuses(things, sentence, index):
    assert solve(sentence, layout_of(*things), VOCABULARY) == index


@pytest.mark.parametrize(
    ("things", "sentence"),
    [
        ((at("cup", 60, 75), at("cup", 76, 75), at("cup", 170, 75)), "left cup"),  # a lead of 8 % of the width
        ((at("cup", 90, 40), at("cup", 150, 75)), "left cup"),  # near the middle of the image
        ((at("dog", 40, 75, 30, 30), at("dog", 140, 75, 40, 40)), "bigger dog"),  # 1.33 times as long
        ((at("cup", 30, 75), at("cup", 60, 20), at("cup", 90, 120)), "middle cup"),  # no row
        ((at("cup", 30, 75, 48), at("cup", 52, 75, 48), at("cup", 99, 75)), "second cup from the left"),  # they overlap
        ((at("cup", 30, 75, 6, 6), at("cup", 100, 75), at("cup", 170, 75)), "second cup from the left"),  # overlooked?
        ((at("dog", 40, 75, 20, 20), at("dog", 140, 75, 60, 20)), "closest dog"),  # not lower
        ((at("cup", 40, 60, 20, 20), at("cup", 140, 100, 60, 60)), "closest cup"),  # cups do not stand on the ground
    ],
)
def test_solver_refuses_what_is_too_close_to_call(things, sentence):
    assert solve(sentence, layout_of(*things), VOCABULARY) is None


def test_size_of_what_the_border_cuts_off_is_unknown():
    big, small, cut = at("dog", 150, 75, 60, 60), at("dog", 50, 75, 30, 30), at("dog", 15, 75, 30, 30)
    assert solve("smaller dog", layout_of(big, small), VOCABULARY) == 1
    assert solve("bigger dog", layout_of(big, small), VOCABULARY) == 0
    assert solve("smaller dog", layout_of(big, cut), VOCABULARY) is None
    assert solve("bigger dog", layout_of(big, cut), VOCABULARY) is None
    assert solve("bigger dog", layout_of(at("dog", 120, 75, 80, 80), cut), VOCABULARY) == 0  # 2.7 times as long


def test_lookalikes_are_rivals():
    cars = at("car", 40, 75), at("car", 150, 75)
    assert solve("left car", layout_of(*cars), VOCABULARY) == 0
    assert solve("left car", layout_of(*cars, at("truck", 15, 75)), VOCABULARY) is None
    assert solve("right car", layout_of(*cars, at("truck", 15, 75)), VOCABULARY) == 1
    assert solve("car", layout_of(cars[0], at("truck", 150, 75)), VOCABULARY) is None
    assert set(Vocabulary(["bear", "teddy bear", "cup"]).lookalikes["bear"]) == {"teddy bear"}


@pytest.mark.parametrize("kind", ["dog", "car"])
def test_nothing_is_said_of_a_kind_that_is_also_a_crowd(kind):
    things = [annotated(at(kind, 40, 75)), annotated(at("cup", 150, 75)), annotated(at(kind, 100, 20), is_crowd=True)]
    layout = measure(things, HEIGHT, WIDTH)
    assert solve(f"left {kind}", layout, VOCABULARY) is None
    assert solve(f"the cup to the right of the {kind}", layout, VOCABULARY) is None
    assert solve("cup", layout, VOCABULARY) == 1
    assert [refusal(index, layout, VOCABULARY) for index in range(3)] == ["its kind is also a crowd", "", "crowd"]
    lookalike = measure([annotated(at("truck", 40, 75)), *things[1:]], HEIGHT, WIDTH)
    assert (solve("truck", lookalike, VOCABULARY) is None) == (kind == "car")


def test_an_annotation_without_pixels_counts_as_a_crowd():
    layout = measure([annotated(at("dog", 40, 75)), Annotated("dog", b"")], HEIGHT, WIDTH)
    assert solve("dog", layout, VOCABULARY) is None
    assert refusal(0, layout, VOCABULARY) == "its kind is also a crowd"


def test_many_objects_of_a_kind_are_not_all_annotated():
    cups = [at("cup", 12 + 19 * index, 75, 14, 14) for index in range(10)]
    assert solve("leftmost cup", layout_of(*cups[1:]), VOCABULARY) == 0
    assert solve("leftmost cup", layout_of(*cups), VOCABULARY) is None


@pytest.mark.parametrize(
    ("things", "reason"),
    [
        ([at("cup", 100, 75, 14, 14)], "too small"),  # 0.65 % of the image
        ([at("cup", 8, 75, 16, 60)], "cut off by the border"),
        ([at("cup", 10, 75, 20, 28)], "cut off by the border"),  # 1.9 % of the image
        ([at("cup", 100, 75), at("cup", 106, 75)], "overlaps another of its kind"),
        ([at("cup", 100, 75), at("wine glass", 106, 75)], "overlaps another of its kind"),
        ([at("cup", 100, 75), at("dog", 106, 75)], ""),
    ],
)
def test_some_objects_are_not_described(things, reason):
    assert refusal(0, layout_of(*things), VOCABULARY) == reason


def test_an_object_in_pieces_is_not_described():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[50:90, 50:70] = mask[50:90, 100:120] = True
    assert refusal(0, measure([Annotated("cup", encode_rle(mask))], HEIGHT, WIDTH), VOCABULARY) == "in pieces"


@pytest.mark.parametrize(
    "name", ["left shoe", "people", "7up", "crowd of ducks", "Object", "()", "trail mix next to it"]
)
def test_kinds_whose_names_are_no_plain_nouns_are_not_described(name):
    vocabulary = Vocabulary([kind_of(name)])
    layout = layout_of(at(kind_of(name), 100, 75))
    assert refusal(0, layout, vocabulary) == "name is no noun for one object"


def test_names_become_words():
    assert kind_of("Traffic_Light (red)") == "traffic light"
    assert kind_of("dog\0\u200b") == "dog"  # NumPy would drop the first, and no reader sees the second
    assert [plural(noun) for noun in ("person", "knife", "bus", "wine glass", "couch", "berry", "toy", "sheep")] == [
        "people", "knives", "buses", "wine glasses", "couches", "berries", "toys", "sheep"
    ]  # fmt: skip
    assert [is_plural(noun) for noun in ("skis", "grapes", "bus", "glass", "dog")] == [True, True, False, False, False]


def test_a_word_for_two_kinds_means_the_kind_of_that_name():
    vocabulary = Vocabulary(["couch", "sofa"])
    assert vocabulary.meanings["sofa"] == "sofa"
    assert vocabulary.nouns("couch") == ("couch",)


@pytest.mark.parametrize("sentence", ["", "the", "red cup", "cup on", "second cup", "cup next to dog", "left cup left"])
def test_parser_refuses_other_sentences(sentence):
    with pytest.raises(ValueError, match="found"):
        parse(sentence, VOCABULARY)


# --- the generator, by a definition without margins

NOUNS = {
    "person": ("person", "people"),
    "couch": ("couch", "couches", "sofa", "sofas"),
    "wine glass": ("wine glass", "wine glasses"),
} | {kind: (kind, f"{kind}s") for kind in ("dog", "cup", "umbrella", "truck", "car")} | {"skis": ("skis",)}  # fmt: skip
NOUN = "|".join(sorted((noun for nouns in NOUNS.values() for noun in nouns), key=len, reverse=True))


def kind_named(noun: str) -> str:
    return next(kind for kind, nouns in NOUNS.items() if noun in nouns)


def fitting(sentence: str, things: list[Thing]) -> set[int]:
    """Indices of all objects that fit a sentence: extremes are the first after sorting, by however little."""
    boxes = np.array([box for _, box in things], dtype=float)
    x, y, area = boxes[:, [0, 2]].mean(1), boxes[:, [1, 3]].mean(1), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    of_kind = {kind: [i for i, (one, _) in enumerate(things) if one == kind] for kind in NOUNS}

    def the(noun: str, count: int = 1) -> list[int]:
        assert len(of_kind[kind_named(noun)]) == count, "it takes this number of objects"
        return of_kind[kind_named(noun)]

    def distance(i: int, j: int) -> float:
        away = np.maximum(np.maximum(boxes[i, :2] - boxes[j, 2:], boxes[j, :2] - boxes[i, 2:]), 0)
        return float(np.hypot(*away))

    tests = []
    between = rf"between the (?:two ({NOUN})|({NOUN}) and the ({NOUN}))"
    relation = rf"((?:to the )?(?:left|right) of|next to|beside|(?:closest|nearest) to|with|on) the ({NOUN})"
    rest = sentence
    for match in list(re.finditer(between, rest)):
        two, first, second = match.groups()
        ends = sorted(x[the(two, 2) if two else the(first) + the(second)])
        tests.append(lambda group, ends=ends: {i for i in group if ends[0] < x[i] < ends[1]})
    rest = re.sub(between, "", rest)
    for words, noun in re.findall(relation, rest):
        (anchor,) = the(noun)
        if "left" in words or "right" in words:
            sign = 1 if "left" in words else -1
            tests.append(lambda group, a=anchor, s=sign: {i for i in group if s * x[i] < s * x[a]})
        elif words in ("closest to", "nearest to"):
            tests.append(lambda group, a=anchor: {min(group, key=lambda i: distance(i, a))})
        else:
            tests.append(lambda group, a=anchor: {i for i in group if distance(i, a) < 10})
    rest = re.sub(relation, "", rest)
    noun = re.search(NOUN, rest).group()
    group = of_kind[kind_named(noun)]
    for word, count in (("two", 2), ("three", 3), ("four", 4)):
        assert f" {word} " not in rest or len(group) == count
    rest = rest.replace(noun, "")
    axes = {"left": x, "right": -x, "top": y, "bottom": y * -1}
    corner = re.search("(top|bottom) (left|right)", rest)
    rank = re.search("(second|2nd|third|3rd).*from (?:the )?(left|right)", rest)
    depth = re.search("closest|nearest|farthest", rest)
    if corner:
        middle = {"left": WIDTH / 2, "right": -WIDTH / 2, "top": HEIGHT / 2, "bottom": -HEIGHT / 2}
        tests.append(lambda group: {i for i in group if all(axes[s][i] < middle[s] for s in corner.groups())})
    elif rank:
        place = 1 if rank.group(1) in ("second", "2nd") else 2
        tests.append(lambda group: {sorted(group, key=lambda i: axes[rank.group(2)][i])[place]})
    else:
        for side in axes:
            if side in rest:
                tests.append(lambda group, side=side: {min(group, key=lambda i: axes[side][i])})
    if re.search("middle|center", rest):
        assert len(group) == 3
        tests.append(lambda group: {sorted(group, key=lambda i: x[i])[1]})
    if re.search("bigg|larg", rest):
        tests.append(lambda group: {max(group, key=lambda i: area[i])})
    if "small" in rest:
        tests.append(lambda group: {min(group, key=lambda i: area[i])})
    if depth:
        sign = 1 if depth.group() == "farthest" else -1
        tests.append(lambda group: {min(group, key=lambda i: sign * boxes[i, 3])})
    return set(group).intersection(*(test(group) for test in tests))


def described(things: list[Thing], seed: int = 0) -> list[tuple[int, str, str]]:
    """Index, style and sentence of all that is said about a layout."""
    layout = layout_of(*things)
    return [
        (index, style, sentence)
        for index in range(len(things))
        if not refusal(index, layout, VOCABULARY)
        for style, sentence in describe(index, layout, VOCABULARY, np.random.default_rng([seed, index])).items()
    ]


def assert_unambiguous(things: list[Thing], seed: int) -> list[str]:
    said, layout = described(things, seed), layout_of(*things)
    for index, _, sentence in said:
        assert solve(sentence, layout, VOCABULARY) == index
        assert fitting(sentence, things) == {index}, sentence
    texts = [sentence.removeprefix("the ") for _, _, sentence in said]
    assert len(set(texts)) == len(texts), "one sentence for two objects, or twice for one"
    return [sentence for _, _, sentence in said]


@st.composite
def random_things(draw) -> list[Thing]:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True))
    found = []
    for _ in range(draw(st.integers(1, 7))):
        x, y = draw(st.integers(0, WIDTH - 20)), draw(st.integers(0, HEIGHT - 20))
        width, height = draw(st.integers(5, 90)), draw(st.integers(5, 90))
        found.append((draw(st.sampled_from(kinds)), (x, y, min(x + width, WIDTH), min(y + height, HEIGHT))))
    return found


@given(random_things(), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_every_sentence_fits_only_its_object(things, seed):
    assert_unambiguous(things, seed)


def random_layouts(count: int) -> list[list[Thing]]:
    """Layouts of up to six objects of at most three kinds, half of them in a row."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        kinds = rng.choice(KINDS, size=int(rng.integers(1, 4)), replace=False).tolist()
        number = int(rng.integers(2, 7))
        places = (np.arange(number) + 0.5) * WIDTH / number if seed % 2 else rng.uniform(15, WIDTH - 15, number)
        found.append(
            [
                at(
                    kinds[int(rng.integers(len(kinds)))],
                    int(place),
                    int(75 + (0.2 if seed % 2 else 1) * rng.uniform(-50, 50)),
                    *(2 * rng.integers(10, 22, 2)).tolist(),
                )
                for place in places
            ]
        )
    return found


@given(random_things(), st.integers(0, 59))
@settings(deadline=None, max_examples=150)
def test_what_the_solver_finds_in_another_layout_fits_too(things, seed):
    layout = layout_of(*things)
    for _, _, sentence in described(random_layouts(60)[seed]):
        index = solve(sentence, layout, VOCABULARY)
        assert index is None or fitting(sentence, things) == {index}, sentence


FORMS = {
    "side": r"left|on the right",
    "vertical": r"top|at the bottom",
    "corner": r"(top|bottom) (left|right)",
    "rank": r"(second|2nd) \w+.* from",
    "middle": r"middle|center",
    "size": r"biggest|largest|smallest",
    "comparison": r"bigger|larger|smaller",
    "depth": r"(closest|nearest|farthest) \w+$|camera",
    "of several": r"of the (two|three)",
    "direction": r"(left|right) of the (?!image|picture|photo)",
    "next": r"next to|beside",
    "nearest": r"(closest|nearest) to the (?!camera)",
    "with": r"with the",
    "between": r"between",
    "two parts": r" and |side that",
    "plural": r"skis on the",
}


def test_every_form_occurs_and_fits_only_its_object():
    texts = [sentence for things in random_layouts(200) for sentence in assert_unambiguous(things, 0)]
    texts += [sentence for seed in range(8) for sentence in assert_unambiguous(list(SCENE), seed)]
    found = Counter(name for name, form in FORMS.items() for sentence in texts if re.search(form, sentence))
    assert set(found) == set(FORMS)


def test_styles_keep_to_their_words():
    said = [row for things in random_layouts(60) for row in described(things)]
    places = re.compile(r"left|right|top|bottom|upper|lower|middle|center|second|third|2nd|3rd")
    words: dict[str, list[int]] = {"refcoco": [], "refcoco+": [], "refcocog": []}
    for _, style, sentence in said:
        assert style != "refcoco+" or not places.search(sentence), sentence
        words[style].append(len(sentence.split()))
    assert np.mean(words["refcoco"]) < 4 < 6 < np.mean(words["refcocog"])


def test_the_seed_changes_words_and_not_the_objects():
    things = list(SCENE)
    several = [tuple(sentence for _, _, sentence in described(things, seed)) for seed in range(8)]
    assert len(set(several)) > 1
    assert described(things, 3) == described(things, 3)
