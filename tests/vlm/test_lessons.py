"""Training data of RefShapes-VLM: separate scenes, targets that remain valid when flipped, and parallel questions."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from l2l_core.config import load_params
from l2l_core.mllm.prompt import keeps_to
from l2l_core.priors.parse import parse_response
from l2l_core.refshapes.dataset import make_scene
from l2l_core.refshapes.scene import draw_scene
from l2l_core.refshapes.solver import measure, solve
from vlm.build import ANSWER, EOS, PROMPT, WIDTH, make_config, make_tokenizer, question_text, response_text
from vlm.losses import BLUR, Pointer, Responses
from vlm.questions import IGNORED, PREFIX, Lessons, Questions, see, visible
from vlm.scenes import ATTRIBUTES, GRID, IMAGE_SIZE_PX, PATCH_PX, SEED, Scenes, make_scenes

DEVICE = torch.device("cpu")
STRAIGHT, MIRRORED = np.zeros(1, bool), np.ones(1, bool)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make_scenes(500, 12)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_training_scenes_do_not_occur_in_the_dataset(scenes: Scenes) -> None:
    """Random streams differ by their first number; the first images of both differ too."""
    params = load_params().refshapes
    assert params.seed != SEED
    own = {image.tobytes() for image in scenes.images}
    shown = [make_scene(params.seed, split, k)[0].image for split in ("train", "val", "test") for k in range(12)]
    assert len(own) == 12
    assert not own & {image.tobytes() for image in shown}


def test_targets_match_the_solver(scenes: Scenes) -> None:
    assert len(scenes.sentences) > 5 * 12
    for row in range(12):
        scene = draw_scene(np.random.default_rng([SEED, 500 + row]), IMAGE_SIZE_PX)
        np.testing.assert_array_equal(scene.image, scenes.images[row])
        world = measure(scene.objects, scene.masks)
        for entry in np.flatnonzero(scenes.scene == row):
            assert solve(str(scenes.sentences[entry]), world) == scenes.target[entry]


def test_patches_and_boxes_match_the_masks(scenes: Scenes) -> None:
    for row in range(12):
        scene = draw_scene(np.random.default_rng([SEED, 500 + row]), IMAGE_SIZE_PX)
        for k, (item, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
            x1, y1, x2, y2 = np.rint(scenes.xyxy[row, k] * IMAGE_SIZE_PX).astype(int)
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert all(edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))
            named = [values[v] for values, v in zip(ATTRIBUTES.values(), scenes.attributes[row, k], strict=True)]
            assert named == [getattr(item, name) for name in ATTRIBUTES]
            mine = np.argwhere(scenes.patch_object[row].reshape(GRID, GRID) == k)
            shares = [mask[y * PATCH_PX :, x * PATCH_PX :][:PATCH_PX, :PATCH_PX].mean() for y, x in mine]
            assert min(shares, default=1) >= 0.3 - 1e-6


def test_flipped_sentences_refer_to_the_flipped_object(scenes: Scenes, tokenizer: Any) -> None:
    """On the flipped masks, the solver finds the same object as before."""
    questions = Questions(scenes, tokenizer)
    sided = 0
    for entry in range(len(scenes.sentences)):
        scene = draw_scene(np.random.default_rng([SEED, 500 + int(scenes.scene[entry])]), IMAGE_SIZE_PX)
        world = measure(scene.objects, scene.masks[:, :, ::-1])
        question, said = questions._tokens(entry, True)
        sentence = re.search(r'expression: "(.*)"', tokenizer.decode(question)).group(1)
        sided += sentence != str(scenes.sentences[entry])
        assert solve(sentence, world) == scenes.target[entry]
        x1, y1, x2, y2 = json.loads(tokenizer.decode(said[:-1]))["boxes"][0]
        ys, xs = np.nonzero(scene.masks[scenes.target[entry]][:, ::-1])
        wanted = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / IMAGE_SIZE_PX * 100
        np.testing.assert_allclose((x1, y1, x2, y2), wanted, atol=0.5 + 1e-4)
    assert sided > 10


def test_flipping_a_scene_flips_its_patch_targets(scenes: Scenes) -> None:
    plain, mirrored = (see(scenes, np.array([4]), flip, DEVICE) for flip in (STRAIGHT, MIRRORED))
    assert torch.equal(plain.pixels.flip(-1), mirrored.pixels)
    grids = [seen.attributes.reshape(GRID, GRID, -1) for seen in (plain, mirrored)]
    assert torch.equal(grids[0].flip(1), grids[1])
    boxes = [seen.xyxy.reshape(GRID, GRID, 4) for seen in (plain, mirrored)]
    there = grids[1][..., 0] > 0
    swapped = boxes[0].flip(1)[..., [2, 1, 0, 3]]
    swapped[..., [0, 2]] = 1 - swapped[..., [0, 2]]
    torch.testing.assert_close(swapped[there], boxes[1][there])


def test_responses_follow_the_prompt_and_can_be_parsed(tokenizer: Any) -> None:
    text = response_text("the small striped star to the left of the red disc", (10, 20, 35, 48), 9)
    assert keeps_to(PROMPT, text)
    assert json.loads(text) == {
        "found": True,
        "target": "star",
        "attributes": ["small", "striped"],
        "relation": "to the left of",
        "anchor": "red disc",
        "boxes": [[10, 20, 35, 48]],
        "point": [22, 34],
        "confidence": 0.9,
    }
    prior = parse_response(text, "percent", (50, 200), (50, 200))
    assert prior.status == "ok"
    assert prior.bbox == pytest.approx((20, 10, 70, 24))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 30
    # Any text can be encoded: unknown words are split into bytes.
    strange = question_text("der größte Würfel, 50 % links?")
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


def test_parallel_questions_do_not_affect_each_other(scenes: Scenes, tokenizer: Any) -> None:
    """Compares with the forward pass of a random model over each question alone."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(make_config(len(tokenizer))).eval()
    row, rng = np.array([3]), np.random.default_rng(0)
    pixels = see(scenes, row, STRAIGHT, DEVICE).pixels
    lessons = Questions(scenes, tokenizer).draw(row, STRAIGHT, 3, rng, DEVICE)
    assert lessons.group.unique().tolist() == [0, 1, 2, 3]
    with torch.inference_mode():
        together = model(
            input_ids=lessons.ids,
            pixel_values=pixels,
            attention_mask=visible(lessons.group, torch.float32),
            position_ids=lessons.position,
        ).logits
        for number in (1, 2, 3):
            mine = (lessons.group[0] == 0) | (lessons.group[0] == number)
            alone = model(input_ids=lessons.ids[:, mine], pixel_values=pixels).logits
            torch.testing.assert_close(together[0, mine][PREFIX:], alone[0, PREFIX:], atol=1e-4, rtol=1e-4)


def test_labels_cover_only_responses_and_the_pointer_precedes_the_box(scenes: Scenes, tokenizer: Any) -> None:
    row = np.array([3])
    lessons = Questions(scenes, tokenizer).draw(row, STRAIGHT, 2, np.random.default_rng(0), DEVICE)
    for number in (1, 2):
        labels = lessons.labels[0][lessons.group[0] == number]
        text = tokenizer.decode(labels[labels != IGNORED].tolist()[:-1])
        assert json.loads(text)["found"]
        assert labels[-1] == EOS
        ids = lessons.ids[0][lessons.group[0] == number]
        differ = (ids != labels)[labels != IGNORED]
        assert not differ[:-2].any()  # only the confidence, which ends every response
        assert tokenizer.decode(ids[-2:-1]) in {f"{tenth / 10}}}" for tenth in range(11)}
        assert ids[-1] == EOS
        assert (labels == IGNORED).sum() == ids.tolist().index(ANSWER) + 1
    for (_, place), object_of, target in zip(lessons.joint.tolist(), lessons.object_of, lessons.target, strict=True):
        pointed = object_of == target
        x1, y1, x2, y2 = json.loads("[" + tokenizer.decode(lessons.ids[0, place + 1 : place + 5]) + "]")
        y, x = np.nonzero(pointed.reshape(GRID, GRID).numpy())
        step = 100 / GRID
        assert x1 - step < x.min() * step
        assert (x.max() + 1) * step < x2 + step
        assert y1 - step < y.min() * step
        assert (y.max() + 1) * step < y2 + step


def test_a_near_coordinate_costs_less_than_a_far_one(tokenizer: Any) -> None:
    """All mass is on one number. The cost is the negative mean of log probabilities under the soft target, by hand."""
    responses = Responses(tokenizer, len(tokenizer))
    (wanted,), (word,) = tokenizer.encode("40,"), tokenizer.encode(" red")
    labels = torch.tensor([[IGNORED, wanted, word]])
    costs = []
    for said in (40, 41, 60):
        logits = torch.zeros(1, 3, len(tokenizer))
        logits[0, 0, tokenizer.encode(f"{said},")[0]] = 5.0
        words, numbers = responses(logits, labels)
        soft = np.exp(-((np.arange(101) - 40) ** 2) / (2 * BLUR**2))
        log_all = np.log(len(tokenizer) - 1 + np.exp(5.0))
        assert float(numbers) == pytest.approx(log_all - 5.0 * (soft / soft.sum())[said], abs=1e-4)
        assert float(words) == pytest.approx(np.log(len(tokenizer)), abs=1e-4)
        costs.append(float(numbers))
    assert costs == sorted(costs)


def test_confidence_is_the_pointer_probability_of_its_object(tokenizer: Any) -> None:
    """Two questions about four patches, with pointer scores set by hand."""
    pointer = Pointer()
    hidden = torch.zeros(1, PREFIX + 8, WIDTH)
    lessons = Lessons(
        *torch.zeros(4, 1, PREFIX + 8, dtype=torch.int64),
        joint=torch.tensor([[0, PREFIX], [0, PREFIX + 1]]),
        object_of=torch.full((2, PREFIX - 1), -1),
        target=torch.tensor([0, 0]),
    )
    lessons.object_of[:, :4] = torch.tensor([0, 0, 1, 1])
    with torch.no_grad():
        for layer in (pointer.query, pointer.key):
            layer.weight.copy_(torch.eye(WIDTH))
            layer.bias.zero_()
    hidden[0, PREFIX, 0], hidden[0, PREFIX + 1, 0] = WIDTH**0.5, -(WIDTH**0.5)
    shares = torch.full((PREFIX - 1,), 1e-9)
    shares[:4] = torch.tensor([0.4, 0.25, 0.3, 0.05])
    hidden[0, 1:PREFIX, 0] = shares.log()
    loss, sure, is_right = pointer(hidden, lessons)
    inverse = 1 / shares  # the scores of the second question
    wanted = [-shares[:2].log().mean(), -(inverse[:2] / inverse.sum()).log().mean()]
    assert float(loss.detach()) == pytest.approx(float(sum(wanted)) / 2, abs=1e-3)
    assert sure.tolist() == pytest.approx([0.65, 0.0], abs=1e-4)  # the second points to a patch without an object
    assert is_right.tolist() == [True, False]
    responses = Responses(tokenizer, len(tokenizer))
    (sure_token,), (word,) = tokenizer.encode("0.9}"), tokenizer.encode(" red")
    labels = torch.tensor([[word, IGNORED, sure_token, IGNORED, sure_token, EOS]])
    told = responses.with_confidence(labels, torch.tensor([0.66, 0.04]))
    assert tokenizer.decode(told[0, [2, 4]]) == "0.7}0.0}"
    assert torch.equal(told[0, [0, 1, 3, 5]], labels[0, [0, 1, 3, 5]])
