"""Short trainings: they can be killed and resumed, and they match the inference engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from vlm import train as training
from vlm.build import make_config, make_tokenizer, question_text
from vlm.losses import Pointer, TowerHeads
from vlm.questions import PREFIX, Questions, see
from vlm.scenes import Scenes, make_scenes
from vlm.train import Settings, response_losses, save, starting_positions, tower_losses, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make_scenes(700, 6)


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(make_config(len(make_tokenizer())))
    starting_positions(model.model.vision_tower)
    heads = TowerHeads()
    return nn.ModuleDict({"model": model, "tower": model.model.vision_tower, "heads": heads, "pointer": Pointer()})


def losses_of(kind: str, modules: nn.ModuleDict, scenes: Scenes) -> Callable[..., Any]:
    if kind == "tower":
        return tower_losses(modules, CPU)
    return response_losses(modules, make_tokenizer(), [scenes], 2, CPU)


@pytest.mark.parametrize("kind", ["tower", "answers"])
def test_a_killed_training_resumes_to_the_same_result(
    kind: str, scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares four uninterrupted steps with four steps that are interrupted after the checkpoint of step 2."""
    monkeypatch.setattr(training, "NOTE_EVERY", 2)
    settings, ends = Settings(kind, 4, 2, 1e-3, 0, ""), []
    for killed_at in (None, 3):
        monkeypatch.setattr(training, "SCRATCH", tmp_path / str(killed_at))
        training.SCRATCH.mkdir()
        modules = network()
        losses, calls = losses_of(kind, modules, scenes), 0

        def counted(*args: Any, losses: Any = losses, killed_at: int | None = killed_at) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == killed_at:
                raise KeyboardInterrupt
            return losses(*args)

        if killed_at is not None:
            with pytest.raises(KeyboardInterrupt):
                train(settings, modules, counted, scenes, scenes, math.inf)
            modules = network()
        curve = train(settings, modules, losses_of(kind, modules, scenes), scenes, scenes, math.inf)
        ends.append((modules.state_dict(), [line["step"] for line in curve or []]))
    (whole, steps), (resumed, again) = ends
    assert steps == again == [2, 4]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = network().state_dict()
    assert not torch.equal(
        whole["tower.embeddings.patch_embedding.weight"], start["tower.embeddings.patch_embedding.weight"]
    )


def test_checkpoint_depends_on_the_settings() -> None:
    settings = Settings("tower", 4, 2, 1e-3, 0, "")
    others = [Settings("tower", 5, 2, 1e-3, 0, ""), Settings("tower", 4, 2, 1e-3, 0, "x")]
    assert len({one.checkpoint for one in (settings, *others)}) == 3


def test_saved_model_gives_the_same_logits_as_training(scenes: Scenes, tmp_path: Path) -> None:
    """Compares the training code with the loaded model and processor."""
    modules, tokenizer = network(), make_tokenizer()
    modules.to(torch.bfloat16).to(torch.float32)  # the precision of the saved weights
    row, straight = np.array([2]), np.zeros(1, bool)
    lessons = Questions(scenes, tokenizer).draw(row, straight, 1, np.random.default_rng(0), CPU)
    with torch.no_grad():
        model = modules["model"]
        patches = training._patch_tokens(modules["tower"], see(scenes, row, straight, CPU).pixels)
        embedded = model.get_input_embeddings()(lessons.ids)
        embedded[:, 1:PREFIX] = model.model.multi_modal_projector(patches)
        trained = model(inputs_embeds=embedded).logits
        save(model, tokenizer, tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(tmp_path)
        sentence = tokenizer.decode(lessons.ids[0]).rpartition('expression: "')[2].partition('"')[0]
        image = {"type": "image", "image": Image.fromarray(scenes.images[2])}
        chat = [{"role": "user", "content": [image, {"type": "text", "text": question_text(sentence)}]}]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"], lessons.ids[:, :length])
        told = loaded(**inputs).logits
    torch.testing.assert_close(told, trained[:, :length], atol=1e-3, rtol=1e-3)
