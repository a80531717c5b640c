"""RefShapes: files checked by pycocotools, the solver by hand-derived results, and scenes for shortcuts."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from pycocotools.coco import COCO

from l2l_core.config import RefShapesParams
from l2l_core.refshapes import dataset
from l2l_core.refshapes.dataset import make_scene, write_refshapes
from l2l_core.refshapes.scene import COLORS, SceneObject
from l2l_core.refshapes.solver import COLOR_WORDS, measure, solve
from stages import refshapes as stage

PARAMS = RefShapesParams(seed=7, image_size_px=96, train_images=60, val_images=8, test_images=8, sentences_per_image=2)
REFS, INSTANCES = "refs(refshapes).json", "instances.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "refshapes"
    write_refshapes(path, PARAMS)
    return path


@pytest.fixture(scope="module")
def refs(folder):
    return json.loads((folder / REFS).read_text())


@pytest.fixture(scope="module")
def coco(folder):
    return COCO(folder / INSTANCES)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(11, "train", index) for index in range(150)]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- files ---


def test_multiple_processes_write_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "IMAGES_PER_PROCESS", 8)
    monkeypatch.setattr(dataset, "thread_count", lambda: 2)
    write_refshapes(tmp_path / "again", PARAMS)
    assert digest(tmp_path / "again") == digest(folder)


def test_output_bytes_are_deterministic_and_change_with_the_seed(folder, tmp_path):
    write_refshapes(tmp_path / "again", PARAMS)
    write_refshapes(tmp_path / "other", PARAMS.model_copy(update={"seed": 8}))
    first, other = digest(folder), digest(tmp_path / "other")
    assert len(first) == 2 + 76
    assert digest(tmp_path / "again") == first
    assert other.keys() == first.keys()
    assert not set(other.values()) & set(first.values())


def test_a_larger_dataset_keeps_the_scenes_of_the_smaller(folder, tmp_path):
    write_refshapes(tmp_path / "large", PARAMS.model_copy(update={"train_images": 63}))
    small, large = digest(folder / "images"), digest(tmp_path / "large" / "images")
    assert small.items() < large.items()


def test_splits_share_no_image_and_no_id(folder, refs):
    assert len(set(digest(folder / "images").values())) == 76
    split_of_image = {(ref["image_id"], ref["split"]) for ref in refs}
    assert len(split_of_image) == 76
    assert [sum(split == wanted for _, split in split_of_image) for wanted in ("train", "val", "test")] == [60, 8, 8]
    for key in ("ref_id", "ann_id"):
        assert len({ref[key] for ref in refs}) == len(refs)


def test_scenes_differ_between_splits_and_seeds():
    pictures = [
        make_scene(seed, split, 3)[0].image.tobytes() for seed in (1, 2) for split in ("train", "val", "test", "extra")
    ]
    assert len(set(pictures)) == 8


def test_annotations_agree_with_pycocotools(folder, coco):
    covered: dict[int, np.ndarray] = {}
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        ys, xs = np.where(mask)
        assert mask.shape == (96, 96)
        assert annotation["area"] == mask.sum() >= 40
        assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert annotation["iscrowd"] == 0
        covered[annotation["image_id"]] = covered.get(annotation["image_id"], 0) + mask
    assert covered.keys() == coco.imgs.keys()
    assert all(3 <= len(coco.getAnnIds(imgIds=[image])) <= 5 for image in covered)
    assert max(total.max() for total in covered.values()) == 1, "visible masks overlap"
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [
        "circle", "square", "triangle", "star", "cross", "ring"
    ]  # fmt: skip


def test_refs_follow_the_refer_layout(folder, refs, coco):
    for ref in refs:
        assert coco.anns[ref["ann_id"]]["image_id"] == ref["image_id"]
        assert coco.anns[ref["ann_id"]]["category_id"] == ref["category_id"]
        assert coco.imgs[ref["image_id"]]["file_name"] == ref["file_name"]
        assert (folder / "images" / ref["file_name"]).is_file()
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        for sentence in ref["sentences"]:
            assert sentence["tokens"] == sentence["sent"].split()
            assert sentence["raw"] == sentence["sent"]
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    assert sorted(sentence["sent_id"] for sentence in sentences) == list(range(152))
    counts = [sum(sentence["style"] == style for sentence in sentences) for style in ("short", "attribute", "long")]
    assert max(counts) - min(counts) <= 3  # one per split


def test_instances_record_the_refshapes_version(folder):
    assert json.loads((folder / INSTANCES).read_text())["info"]["version"] == dataset.REFSHAPES_VERSION


def test_a_failed_write_keeps_the_old_dataset_and_leaves_no_other_files(tmp_path, monkeypatch):
    target = tmp_path / "refshapes"
    tiny = PARAMS.model_copy(update={"train_images": 2, "val_images": 1, "test_images": 1})
    write_refshapes(target, tiny)
    before = digest(target)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "encode_rle", fail)
        with pytest.raises(OSError, match="disk full"):
            write_refshapes(target, tiny.model_copy(update={"seed": 9}))
    assert digest(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]
    write_refshapes(target, tiny.model_copy(update={"seed": 9}))
    assert digest(target) != before
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]


def test_stage_uses_the_configured_parameters(tmp_path, monkeypatch):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["refshapes"] |= {"train_images": 3, "val_images": 1, "test_images": 1, "image_size_px": 64}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    stage.main()
    written = json.loads((tmp_path / "data" / "refshapes" / INSTANCES).read_text())
    assert [(image["width"], image["height"]) for image in written["images"]] == [(64, 64)] * 5


# --- the solver, on scenes drawn by hand: squares of a given side on a 100 x 100 grid ---


def world(*rows):
    """Rows: description without size, center x, center y, side. Every mask is a square, whatever the named shape."""
    objects, masks = [], np.zeros((len(rows), 100, 100), dtype=bool)
    for mask, (description, x, y, side) in zip(masks, rows, strict=True):
        color, texture, shape = description.split()
        objects.append(SceneObject(shape=shape, color=color, size="unused", texture=texture))
        mask[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = True
    return measure(objects, masks)


FIVE = (
    ("red plain circle", 20, 20, 16),  # 0
    ("red striped star", 80, 20, 16),  # 1
    ("blue plain circle", 25, 75, 30),  # 2
    ("blue dotted ring", 75, 75, 30),  # 3
    ("red plain star", 50, 50, 30),  # 4
)


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        ("blue circle", 2),
        ("the ring", 3),
        ("pick the small star", 1),
        ("the tiny disc", 0),
        ("the large star", 4),
        ("spotted donut", 3),
        ("leftmost star", 4),
        ("the top right star", 1),
        ("the star in the upper right corner", 1),
        ("the circle at the top", 0),
        ("bottom circle", 2),
        ("second star from the left", 1),
        ("third red one from the left", 1),
        ("second red shape from the right", 4),
        ("object in the middle", 4),
        ("the circle that is not red", 2),
        ("the red one that is not a star", 0),
        ("the small red one without stripes", 0),
        ("star with stripes", 1),
        ("the one that is neither red nor dotted", 2),
        ("the blue circle that is below the small circle", 2),
        ("the blue one that is to the right of the big circle", 3),
        ("the blue one sitting left of the ring with dots", 2),
        ("the star closest to the small star", 4),
        ("the circle that is not big and is above the blue circle", 0),
        ("biggest star", 4),
        ("smallest circle", 0),
        # several objects match
        ("red one", None),
        ("star", None),
        ("the red one without stripes", None),
        ("biggest thing", None),
        # no object matches
        ("green star", None),
        ("the ring with a border", None),
        ("the one that is neither red nor blue", None),
        ("third circle from the left", None),
        ("the circle on the right", None),
        # too close to call
        ("rightmost thing", None),  # x 80 against 75
        ("circle on the left", None),  # x 20 against 25
        ("second thing from the top", None),  # two at y 20
        ("left star", None),  # x 50 is not on a side
        ("the star that is above the ring", None),  # the big star lies diagonally
        ("the red star that is to the right of the blue circle", None),  # both lie diagonally
        # the relation refers to no unique object
        ("the ring that is right of the circle", None),
        ("the circle that is left of the green star", None),
    ],
)
def test_solver_resolves_sentences_about_five_objects(sentence, answer):
    assert solve(sentence, world(*FIVE)) == answer


@pytest.mark.parametrize(("x", "answer"), [(42, 0), (88, None), (95, 0)])
def test_next_to_requires_a_clearly_separate_rival(x, answer):
    """The box ends at column 67. A second circle is 3, 13 or 20 pixels away; 13 is neither close nor separate."""
    circles = (("red plain circle", 42, 50, 16), ("red plain circle", x, 90 if x == 42 else 50, 10))
    scene = world(*circles, ("blue plain square", 60, 50, 16))
    assert solve("the circle next to the box", scene) == answer


@pytest.mark.parametrize(
    ("side", "small", "big"), [(16, 0, None), (26, None, None), (30, None, 0)], ids=["small", "between", "big"]
)
def test_a_medium_size_is_neither_small_nor_big(side, small, big):
    scene = world(("red plain circle", 50, 50, side))
    assert solve("small circle", scene) == small
    assert solve("the circle that is not small", scene) == big
    assert solve("big circle", scene) == big
    assert solve("circle", scene) == 0


@pytest.mark.parametrize(("x", "answer"), [(35, 0), (47, None), (65, None)])
def test_left_side_requires_a_clear_position(x, answer):
    assert solve("circle on the left side", world(("red plain circle", x, 50, 16))) == answer


def test_an_ambiguous_group_member_makes_ordinals_ambiguous():
    """The second small circle depends on whether the medium circle counts as small."""
    row = [("red plain circle", 15, 50, 16), ("red plain circle", 40, 50, 26), ("red plain circle", 65, 50, 16)]
    assert solve("second small circle from the left", world(*row)) is None
    assert solve("second circle from the left", world(*row)) == 1
    assert solve("leftmost small circle", world(*row)) == 0
    four = [*row, ("red plain circle", 88, 50, 16)]
    assert solve("third small circle from the left", world(*four)) is None
    assert solve("third circle from the left", world(*four)) == 2


@pytest.mark.parametrize(("y", "answer"), [(60, 0), (20, None)], ids=["mostly sideways", "mostly above"])
def test_right_of_requires_a_mostly_horizontal_offset(y, answer):
    scene = world(("red plain circle", 60, y, 16), ("red plain ring", 30, 75, 16))
    assert solve("circle right of the ring", scene) == answer


@pytest.mark.parametrize(("side", "answer"), [(20, 0), (26, None)])
def test_biggest_requires_a_clear_size_difference(side, answer):
    assert (
        solve("biggest circle", world(("red plain circle", 20, 50, 30), ("red plain circle", 70, 50, side))) == answer
    )


@pytest.mark.parametrize(("x", "answer"), [(90, 0), (83, None)])
def test_closest_requires_a_clear_distance_difference(x, answer):
    """The gaps from the ring (columns 42-57) to the circles are 14 columns on the left and 24 or 17 on the right."""
    circles = (("red plain circle", 20, 50, 16), ("red plain circle", x, 50, 16))
    assert solve("the circle closest to the ring", world(*circles, ("red plain ring", 50, 50, 16))) == answer


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "red",
        "the circle flies",
        "circle to the left of",
        "second circle",
        "circle that is",
        "circle that is neither red or blue",
        "circle with red",
        "upper circle",
        "circle from the left",
    ],
)
def test_solver_refuses_sentences_outside_its_grammar(sentence):
    with pytest.raises(ValueError, match="expected"):
        solve(sentence, world(*FIVE))


# --- sentences ---


def test_every_sentence_resolves_to_its_annotation(refs, coco):
    for ref in refs:
        anns = coco.loadAnns(coco.getAnnIds(imgIds=[ref["image_id"]]))
        names = {category["id"]: category["name"] for category in coco.cats.values()}
        objects = [
            SceneObject(names[a["category_id"]], a["attributes"]["color"], "unused", a["attributes"]["texture"])
            for a in anns
        ]
        scene = measure(objects, np.stack([coco.annToMask(a).astype(bool) for a in anns]))
        for sentence in ref["sentences"]:
            assert anns[solve(sentence["sent"], scene)]["id"] == ref["ann_id"], sentence["sent"]


OPPOSITES = {
    2: {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"},
    1: {"top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"}
    | {"topmost": "lowest", "highest": "lowest", "lowest": "topmost"}
    | {"above": "below", "below": "above", "under": "above", "beneath": "above"},
}


@pytest.mark.parametrize("axis", [1, 2], ids=["upside down", "left for right"])
def test_mirrored_sentences_resolve_to_the_same_target_in_mirrored_scenes(scenes, axis):
    pairs = OPPOSITES[axis]
    for scene, expressions in scenes:
        mirrored = measure(scene.objects, np.flip(scene.masks, axis=axis))
        for expression in expressions:
            sentence = " ".join(pairs.get(word, word) for word in expression.sentence.split())
            assert solve(sentence, mirrored) == expression.target, sentence


def test_attribute_sentences_contain_no_location_words(scenes):
    place = re.compile(
        r"left|right|top|bottom|upper|lower|middle|center|corner|side|highest|lowest|above|below|under|beneath"
        r"|next|closest|nearest|from|second|third|beside|\bin\b|\bon\b|\bat\b|\bto\b"
    )
    sentences = {
        style: [e.sentence for _, es in scenes for e in es if e.style == style]
        for style in ("short", "attribute", "long")
    }
    assert len(sentences["attribute"]) == 100
    assert not [sentence for sentence in sentences["attribute"] if place.search(sentence)]
    assert sum(place.search(sentence) is not None for sentence in sentences["short"]) > 50
    words = {style: np.mean([len(sentence.split()) for sentence in found]) for style, found in sentences.items()}
    assert words["long"] > 2 * max(words["short"], words["attribute"])


def test_vocabulary_has_moderate_size(scenes):
    words = {word for _, expressions in scenes for e in expressions for word in e.sentence.split()}
    assert 70 <= len(words) <= 110


@pytest.mark.parametrize(("side_px", "sentences"), [(64, 1), (200, 4)])
def test_make_scene_supports_other_image_sizes_and_sentence_counts(side_px, sentences):
    for index in range(6):
        scene, expressions = make_scene(3, "extra", index, side_px, sentences)
        assert scene.image.shape == (side_px, side_px, 3)
        assert scene.image.dtype == np.uint8
        assert len({expression.sentence for expression in expressions}) == sentences
        assert scene.masks.shape == (len(scene.objects), side_px, side_px)


# --- shortcuts and visibility ---


def test_no_single_attribute_identifies_the_target(scenes):
    pairs = [(scene.objects, scene.objects[e.target]) for scene, expressions in scenes for e in expressions]
    color = np.mean([sum(o.color == t.color for o in objects) == 1 for objects, t in pairs])
    shape = np.mean([sum(o.shape == t.shape for o in objects) == 1 for objects, t in pairs])
    both = np.mean([sum((o.shape, o.color) == (t.shape, t.color) for o in objects) == 1 for objects, t in pairs])
    assert color == 0
    assert shape == 0
    assert both < 0.5


def seen_color(scene, index):
    """Mean color of the object's pixels without dark texture: those at least as bright as its median."""
    pixels = scene.image[scene.masks[index]].astype(float)
    brightness = pixels.sum(axis=1)
    return pixels[brightness >= np.median(brightness)].mean(axis=0)


def test_a_color_only_solver_is_mostly_wrong(scenes):
    names = {word: name for name, words in COLOR_WORDS.items() for word in words}
    right = []
    for scene, expressions in scenes:
        seen = np.array([seen_color(scene, k) for k in range(len(scene.objects))])
        for expression in expressions:
            named = [names[word] for word in expression.sentence.split() if word in names]
            wanted = np.array(COLORS[named[0]]) if named else seen.mean(axis=0)
            right.append(int(np.linalg.norm(seen - wanted, axis=1).argmin()) == expression.target)
    assert np.mean(right) < 0.4


def test_colors_are_distinguishable_under_any_lighting(scenes):
    palette = np.array(list(COLORS.values()), dtype=float)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    wrong, total = 0, 0
    for scene, _ in scenes:
        for index, item in enumerate(scene.objects):
            seen = seen_color(scene, index)
            nearest = list(COLORS)[int((palette @ (seen / np.linalg.norm(seen))).argmax())]
            wrong += nearest != item.color
            total += 1
    assert wrong <= 0.01 * total


def test_measured_sizes_match_the_drawn_sizes(scenes):
    """For each object alone, the solver reads the intended size from the mask."""
    for scene, _ in scenes:
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            alone = measure([item], mask[None])
            assert solve("small one", alone) == (0 if item.size == "small" else None)
            assert solve("big one", alone) == (0 if item.size == "big" else None)


def test_big_and_small_areas_do_not_overlap(scenes):
    area_px: dict[tuple[str, str], list[int]] = {}
    for scene, _ in scenes:
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            area_px.setdefault((item.shape, item.size), []).append(int(mask.sum()))
    for shape in {shape for shape, _ in area_px}:
        assert np.median(area_px[shape, "big"]) > 2 * np.median(area_px[shape, "small"])
        assert min(area_px[shape, "big"]) > 1.4 * max(area_px[shape, "small"])


def test_masks_contain_only_pixels_of_their_object(scenes):
    """Nearly every pixel in the visible mask of a plain object has its color, even where objects overlap."""
    palette = np.array(list(COLORS.values()), dtype=float)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    overlaps = 0
    for scene, _ in scenes:
        pixels = scene.image / np.linalg.norm(scene.image, axis=2, keepdims=True).clip(1)
        nearest = (pixels @ palette.T).argmax(axis=2)
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            if item.texture == "plain" and item.color != "white":  # white is close to the gray of backgrounds
                assert (nearest[mask] == list(COLORS).index(item.color)).mean() > 0.85
        touching = measure(scene.objects, scene.masks).gap
        overlaps += bool((touching[np.triu_indices(len(touching), k=1)] < 1.5 / 96).any())
    assert overlaps > 0.2 * len(scenes), "objects that cover each other are part of the task"


def test_textures_are_visible(scenes):
    """Measures the share of an object's pixels that are much darker than its bright part."""
    dark_share: dict[str, list[float]] = {"plain": [], "striped": [], "dotted": [], "outlined": []}
    for scene, _ in scenes:
        for index, item in enumerate(scene.objects):
            dark_below = 0.65 * seen_color(scene, index).sum()
            dark_share[item.texture].append(float((scene.image[scene.masks[index]].sum(axis=1) < dark_below).mean()))
    assert np.quantile(dark_share.pop("plain"), 0.95) < 0.05
    for texture, shares in dark_share.items():
        assert np.quantile(shares, 0.05) > 0.1, texture
