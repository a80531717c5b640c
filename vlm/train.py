"""Train RefShapes-VLM from scratch: the tower first, on what lies in every patch; then the whole, on questions.

    python -m vlm.train [--shards 24] [--tower-steps 2200] [--steps 2600] [--device cuda] [--minutes 9]

Writes vlm/refshapes-vlm/ (a folder that transformers and vLLM load) and vlm/curve.jsonl, a line each 250 steps, when it
is done; killed or out of time, the same call goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from l2l_core.config import load_params
from vlm.build import WIDTH, make_config, make_processor, make_tokenizer
from vlm.losses import Pointer, Responses, TowerHeads
from vlm.questions import PREFIX, Questions, see, visible
from vlm.scenes import GRID, SEED, Scenes, read_scenes, stored_scenes

FOLDER = Path("vlm/refshapes-vlm")
CURVE = Path("vlm/curve.jsonl")
SCRATCH = Path(".scratch/vlm")
HELD_OUT_SHARD = 100_000  # of scenes that training never sees
HELD_OUT_SCENES = 100  # of them, that the curve is measured on
NOTE_EVERY = 250  # steps between lines of the curve, and checkpoints
NUMBERS_WEIGHT, DENSE_WEIGHT = 2.0, 0.5

Row = dict[str, Any]
Losses = Callable[[Scenes, NDArray[np.int64], NDArray[np.bool_], np.random.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Settings:
    """Of one of the two trainings."""

    name: str
    steps: int
    batch: int  # scenes
    rate: float  # highest learning rate
    seed: int
    before: str  # what else decides where it gets to: the number of scenes, the settings of the training before

    @property
    def checkpoint(self) -> Path:
        """Another training has another one."""
        return SCRATCH / f"{self.name}-{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}.pt"

    def rate_at(self, step: int) -> float:
        """Linear warm-up over a twentieth of the steps, then a cosine to a hundredth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.rate * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def train(
    settings: Settings, modules: nn.ModuleDict, losses: Losses, scenes: Scenes, held_out: Scenes, until: float
) -> list[Row] | None:
    """Train in place from the last checkpoint on; the lines of the curve, None where the time `until` came first."""
    weights = [weight for weight in modules.parameters() if weight.requires_grad]
    groups = [[w for w in weights if w.ndim > 1], [w for w in weights if w.ndim <= 1]]
    decays = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.05, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(decays, lr=settings.rate, betas=(0.9, 0.98))
    path, start, curve = settings.checkpoint, 0, []
    if path.exists():
        stored = torch.load(path, map_location="cpu")
        modules.load_state_dict(stored["modules"])
        optimizer.load_state_dict(stored["optimizer"])
        start, curve = stored["step"], stored["curve"]
    held_out_scenes = min(HELD_OUT_SCENES, len(held_out.images))
    began, tested = time.monotonic(), np.arange(held_out_scenes)
    for step in range(start, settings.steps):
        rng = np.random.default_rng([settings.seed, step])  # of the step's own, so that a resumed run draws the same
        rows = rng.integers(len(scenes.images), size=settings.batch)
        loss, _ = losses(scenes, rows, rng.random(settings.batch) < 0.5, rng)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        done, is_late = step + 1, time.monotonic() > until
        if done % NOTE_EVERY == 0 or done == settings.steps or is_late:
            with torch.no_grad():
                held, told = losses(held_out, tested, np.zeros(held_out_scenes, bool), np.random.default_rng(0))
            speed = (done - start) * settings.batch / (time.monotonic() - began)
            parts = {"loss": float(loss.detach()), "held_out": float(held), **told, "scenes_per_s": speed}
            curve.append({"part": settings.name, "step": done} | {key: round(value, 4) for key, value in parts.items()})
            print(curve[-1], flush=True)
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "curve": curve}
            torch.save(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        if is_late and done < settings.steps:
            return None
    return curve


def tower_losses(modules: nn.ModuleDict, device: torch.device) -> Losses:
    """What lies in every patch."""

    def losses(
        scenes: Scenes, rows: NDArray[np.int64], flip: NDArray[np.bool_], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        seen = see(scenes, rows, flip, device)
        with torch.autocast(device.type, torch.bfloat16):
            return modules["heads"](_patch_tokens(modules["tower"], seen.pixels), seen)

    return losses


def response_losses(
    modules: nn.ModuleDict, tokenizer: Any, sources: list[Scenes], per_scene: int, device: torch.device
) -> Losses:
    """The same, and the responses to questions about the scenes of `sources`."""
    model: Any = modules["model"]  # of transformers: its parts have no types
    heads, pointer = modules["heads"], modules["pointer"]
    responses = Responses(tokenizer, model.config.text_config.vocab_size).to(device)
    questions = {id(scenes): Questions(scenes, tokenizer) for scenes in sources}

    def losses(
        scenes: Scenes, rows: NDArray[np.int64], flip: NDArray[np.bool_], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        lessons = questions[id(scenes)].draw(rows, flip, per_scene, rng, device)
        seen = see(scenes, rows, flip, device)
        with torch.autocast(device.type, torch.bfloat16):
            patches = _patch_tokens(model.model.vision_tower, seen.pixels)
            dense, told = heads(patches, seen)
            embedded = model.get_input_embeddings()(lessons.ids)
            image = model.model.multi_modal_projector(patches).to(embedded.dtype)
            embedded = torch.cat([embedded[:, :1], image, embedded[:, PREFIX:]], dim=1)
            hidden = model.model.language_model(
                inputs_embeds=embedded,
                attention_mask=visible(lessons.group, embedded.dtype),
                position_ids=lessons.position,
                use_cache=False,
            ).last_hidden_state
            pointing, sure, is_right = pointer(hidden, lessons)
            words, numbers = responses(model.lm_head(hidden), responses.with_confidence(lessons.labels, sure))
        told = {
            "words": float(words.detach()),
            "numbers": float(numbers.detach()),
            "pointed": float(is_right.float().mean()),
            "sure": float(sure.mean()),
        } | told
        return words + NUMBERS_WEIGHT * numbers + pointing + DENSE_WEIGHT * dense, told

    return losses


def save(model: LlavaForConditionalGeneration, tokenizer: Any, folder: Path) -> None:
    """Everything that an engine loads, in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    # The tower's weights under the names that LLaVAs of the hub have: vLLM knows no others, transformers both.
    file = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def starting_positions(tower: Any) -> None:
    """The tower's positions start as sines of row and column, so that nearness need not be found out first."""
    quarter = WIDTH // 4
    frequency = 10 ** (-2 * torch.arange(quarter) / quarter) * math.pi / 2
    axes = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in axes]
    table = tower.embeddings.position_embedding.weight
    with torch.no_grad():
        table.zero_()
        table[1:] = 0.5 * torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def _patch_tokens(tower: Any, pixels: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, P, WIDTH], as the language model gets them: without the class token and the last norm."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24, help="of a thousand scenes; missing ones are drawn")
    parser.add_argument("--tower-steps", type=int, default=2200)
    parser.add_argument("--tower-batch", type=int, default=32, help="scenes")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=16, help="scenes")
    parser.add_argument("--questions", type=int, default=8, help="of a scene at once")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that draw scenes")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="after which it stops, to go on at the next call"
    )
    args = parser.parse_args()
    if load_params().refshapes.seed == SEED:
        raise SystemExit(f"refshapes.seed: got {SEED}, the seed of the training's own scenes; choose another")
    until = time.monotonic() + 60 * args.minutes
    device = torch.device(args.device)
    scenes = read_scenes(stored_scenes(SCRATCH / "scenes", range(args.shards), args.workers))
    held_out = read_scenes(stored_scenes(SCRATCH / "scenes", [HELD_OUT_SHARD], 1))
    print(f"{len(scenes.images)} scenes, {len(scenes.sentences)} sentences", flush=True)

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlavaForConditionalGeneration(make_config(len(tokenizer)))
    tower, heads, pointer = model.model.vision_tower, TowerHeads(), Pointer()
    starting_positions(tower)
    first = nn.ModuleDict({"tower": tower, "heads": heads}).to(device)
    settings = Settings("tower", args.tower_steps, args.tower_batch, args.rate, 1, f"{args.shards} shards")
    curve = train(settings, first, tower_losses(first, device), scenes, held_out, until)
    if curve is not None:
        second = nn.ModuleDict({"model": model, "heads": heads, "pointer": pointer}).to(device)
        # "answers": the name of this part in the stored curve and checkpoints.
        settings = Settings("answers", args.steps, args.batch, args.rate, 2, f"{args.questions} questions {settings}")
        losses = response_losses(second, tokenizer, [scenes, held_out], args.questions, device)
        more = train(settings, second, losses, scenes, held_out, until)
        curve = None if more is None else curve + more
    if curve is None:
        raise SystemExit("out of time; the same call goes on")
    save(model, tokenizer, FOLDER)
    CURVE.write_text("".join(json.dumps(line) + "\n" for line in curve), encoding="utf-8")


if __name__ == "__main__":
    main()
