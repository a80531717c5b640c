"""Train RefShapes-VLM from scratch: the tower first, on what lies in every patch; then the whole, on questions.

    python -m vlm.train [--shards 40] [--tower-steps 4000] [--steps 8000] [--device cuda] [--minutes 9]

Writes vlm/refshapes-vlm/ (a folder that transformers and vLLM load) and vlm/curve.jsonl; killed or out of time, the
same call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vlm.build import (
    ANSWER,
    BOS,
    EOS,
    HEAD_WIDTH,
    IMAGE,
    JOINTS,
    NUMBERS,
    PAD,
    WIDTH,
    answer_text,
    make_config,
    make_processor,
    make_tokenizer,
    question_text,
)
from vlm.scenes import ATTRIBUTES, GRID, Scenes, read_scenes, stored_scenes

FOLDER = Path("vlm/refshapes-vlm")
CURVE = Path("vlm/curve.jsonl")
SCRATCH = Path(".scratch/vlm")
HELD_OUT_SHARD = 100_000  # of scenes that training never sees
SMOOTHING = 1.5  # percent: standard deviation of the soft targets for a coordinate, since 41 is nearly as good as 40
FLIP_WORDS = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}


@dataclass(frozen=True)
class Settings:
    """Of one of the two trainings."""

    steps: int
    batch: int  # scenes
    rate: float  # highest learning rate


class TowerHeads(nn.Module):
    """What a patch's token must tell: attributes of its object, and the object's box. Thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(WIDTH, 1 + len(values)) for values in ATTRIBUTES.values())
        self.box = nn.Linear(WIDTH, 4)

    def loss(self, patches: Tensor, seen: Patches) -> tuple[Tensor, dict[str, float]]:
        """patches: [B, P, WIDTH] -> scalar, and accuracies on patches of objects."""
        on = seen.attributes[..., 0] > 0
        total, told = patches.new_zeros(()), {}
        for k, (name, head) in enumerate(zip(ATTRIBUTES, self.attributes, strict=True)):
            logits = head(patches).float()
            total = total + F.cross_entropy(logits.flatten(0, 1), seen.attributes[..., k].flatten())
            told[name] = float((logits.argmax(-1) == seen.attributes[..., k])[on].float().mean())
        off = (self.box(patches).float() - seen.xyxy)[on].abs()
        told["box_error"] = float(off.detach().mean())
        return total + 5 * off.mean(), told


@dataclass(frozen=True)
class Patches:
    """Targets of the tower: attributes [B, P, 4] int64, 0: no object; xyxy [B, P, 4] shares."""

    attributes: Tensor
    xyxy: Tensor


def patches_of(scenes: Scenes, rows: NDArray[np.int64], flip: NDArray[np.bool_], device: torch.device) -> Patches:
    grid = scenes.patch_object[rows].reshape(len(rows), GRID, GRID)
    grid = np.where(flip[:, None, None], grid[:, :, ::-1], grid).reshape(len(rows), -1).astype(np.int64)
    inside = grid >= 0
    which = np.maximum(grid, 0)[..., None]
    attributes = np.take_along_axis(scenes.attributes[rows].astype(np.int64), which, axis=1) + 1
    boxes = np.take_along_axis(flipped(scenes.xyxy[rows], flip[:, None]), which, axis=1)
    return Patches(
        torch.from_numpy(np.where(inside[..., None], attributes, 0)).to(device), torch.from_numpy(boxes).to(device)
    )


def flipped(xyxy: NDArray[np.float32], flip: NDArray[np.bool_]) -> NDArray[np.float32]:
    mirrored = np.stack([1 - xyxy[..., 2], xyxy[..., 1], 1 - xyxy[..., 0], xyxy[..., 3]], axis=-1)
    return np.where(flip[..., None], mirrored, xyxy)


def pixels_of(scenes: Scenes, rows: NDArray[np.int64], flip: NDArray[np.bool_], device: torch.device) -> Tensor:
    """[B, 3, S, S], as the image processor gives them."""
    images = scenes.images[rows]
    images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device).float()
    return (pixels / 255 - 0.5) / 0.25


class Questions:
    """Sentences of scenes as token ids, several a scene in one row: all see the image, none another question."""

    def __init__(self, scenes: Scenes, tokenizer: Any, per_scene: int) -> None:
        self.scenes, self.per_scene = scenes, per_scene
        self.first = np.searchsorted(scenes.scene, np.arange(len(scenes.images) + 1))
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, ...], list[int]] = {}
        self.number = {n: tokenizer.encode(f"{n}")[0] for n in NUMBERS}
        self.number_comma = {n: tokenizer.encode(f"{n},")[0] for n in NUMBERS}
        self.box_joint = tokenizer.encode(JOINTS[4])[0]

    def encode(self, text: str) -> list[int]:
        key = (text,)
        if key not in self.known:
            self.known[key] = self.tokenizer.encode(text)
        return self.known[key]

    def batch(
        self, rows: NDArray[np.int64], flip: NDArray[np.bool_], rng: np.random.Generator, device: torch.device
    ) -> dict[str, Tensor]:
        """input_ids, labels, position, group [B, L]; places of coordinates and of the token before them."""
        prefix = 1 + GRID * GRID
        texts: list[list[int]] = []
        made = []
        for row, is_flipped in zip(rows.tolist(), flip.tolist(), strict=True):
            low, high = int(self.first[row]), int(self.first[row + 1])
            chosen = rng.permutation(np.arange(low, high))[: self.per_scene]
            ids, labels, position, group = [BOS] + [IMAGE] * (prefix - 1), [-100] * prefix, list(range(prefix)), [0] * prefix
            joints = []
            for g, entry in enumerate(chosen.tolist(), start=1):
                sentence, target = str(self.scenes.sentences[entry]), int(self.scenes.target[entry])
                if is_flipped:
                    sentence = " ".join(FLIP_WORDS.get(word, word) for word in sentence.split())
                box = flipped(self.scenes.xyxy[row, target][None], np.array([is_flipped]))[0]
                x1, y1, x2, y2 = (round(100 * float(value)) for value in box)
                asked = [*self.encode(question_text(sentence)), ANSWER]
                said = [*self.tokenizer.encode(answer_text(sentence, (x1, y1, x2, y2), 9)), EOS]
                start = len(ids)
                joints.append((start + len(asked) + said.index(self.box_joint), target))
                ids += asked + said
                labels += [-100] * len(asked) + said
                position += list(range(prefix, prefix + len(asked) + len(said)))
                group += [g] * (len(asked) + len(said))
            texts.append(ids)
            made.append((ids, labels, position, group, joints))
        length = max(map(len, texts))
        pad = lambda values, fill: torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)  # noqa: E731
        grid = self.scenes.patch_object[rows].reshape(len(rows), GRID, GRID)
        grid = np.where(flip[:, None, None], grid[:, :, ::-1], grid).reshape(len(rows), -1)
        joint_rows = [(b, place, target) for b, entry in enumerate(made) for place, target in entry[4]]
        return {
            "ids": pad([entry[0] for entry in made], PAD),
            "labels": pad([entry[1] for entry in made], -100),
            "position": pad([entry[2] for entry in made], 0),
            "group": pad([entry[3] for entry in made], -1),
            "joint": torch.tensor([(b, place) for b, place, _ in joint_rows], device=device),
            "pointed": torch.from_numpy(np.stack([grid[b] == target for b, _, target in joint_rows])).to(device),
        }


def mask_of(group: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] numbers of questions (0: the image) -> additive mask [B, 1, L, L]: causal, within a question and to the image."""
    order = torch.arange(group.shape[1], device=group.device)
    causal = order[None, :, None] >= order[None, None, :]
    seen = causal & ((group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0))
    return torch.zeros(seen.shape, dtype=dtype, device=group.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class Pointer(nn.Module):
    """Which patches the token before the box means: a short cut for the gradient, thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def loss(self, hidden: Tensor, joint: Tensor, pointed: Tensor) -> tuple[Tensor, float]:
        """hidden [B, L, WIDTH], joint [Q, 2] (row, place), pointed [Q, P] -> scalar, share of questions that hit."""
        query = self.query(hidden[joint[:, 0], joint[:, 1]])
        keys = self.key(hidden[:, 1 : 1 + GRID * GRID])[joint[:, 0]]
        scores = (keys @ query[:, :, None])[..., 0].float() / math.sqrt(WIDTH)
        wanted = pointed.float() / pointed.float().sum(-1, keepdim=True).clamp(min=1)
        hit = pointed.gather(1, scores.argmax(-1, keepdim=True)).float().mean()
        return -(wanted * F.log_softmax(scores, -1)).sum(-1).mean(), float(hit)


def smoothed_targets(questions: Questions, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of each token among the soft targets (-1: none), and the targets [R, V]."""
    row_of = torch.full((vocabulary,), -1, dtype=torch.int64)
    targets = torch.zeros(2 * len(NUMBERS), vocabulary)
    for offset, table in ((0, questions.number), (len(NUMBERS), questions.number_comma)):
        tokens = torch.tensor(list(table.values()))
        near = torch.exp(-((torch.arange(101)[:, None] - torch.arange(101)[None, :]) ** 2) / (2 * SMOOTHING**2))
        near = near / near.sum(-1, keepdim=True)
        for n, token in table.items():
            row_of[token] = offset + n
            targets[offset + n, tokens] = near[n]
    return row_of.to(device), targets.to(device)


def answer_loss(logits: Tensor, labels: Tensor, row_of: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over words, and over coordinates."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
    rows = row_of[labels]
    numbers = rows >= 0
    words = F.cross_entropy(logits[~numbers], labels[~numbers])
    return words, F.cross_entropy(logits[numbers], soft[rows[numbers]])


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a hundredth."""
    warm = max(1, settings.steps // 20)
    if step < warm:
        return settings.rate * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def starting_positions(model: LlavaForConditionalGeneration) -> None:
    """The tower's positions start as sines of row and column, so that nearness need not be found out first."""
    table = model.model.vision_tower.embeddings.position_embedding.weight
    quarter = WIDTH // 4
    frequency = 10 ** (-2 * torch.arange(quarter) / quarter) * math.pi / 2
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [values.flatten()[:, None] * frequency for values in (rows, columns)]
    sines = torch.cat([turn for angle in angles for turn in (angle.sin(), angle.cos())], dim=1)
    with torch.no_grad():
        table.zero_()
        table[1:] = 0.5 * sines


def orders(count: int, batch: int, seed: int, start: int, steps: int) -> Iterator[tuple[NDArray[np.int64], np.random.Generator]]:
    """Rows of each step from `start` on, and a generator of the step's own."""
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        yield rng.integers(count, size=batch), rng


class Run:
    """State of a training that can be stopped: networks, optimiser, step."""

    def __init__(self, name: str, modules: dict[str, nn.Module], settings: Settings) -> None:
        self.path = SCRATCH / f"{name}.pt"
        self.modules, self.settings, self.step = modules, settings, 0
        weights = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.weights = weights
        decayed = [p for p in weights if p.ndim > 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0}],
            lr=settings.rate,
            weight_decay=0.05,
            betas=(0.9, 0.98),
        )
        if self.path.exists():
            stored = torch.load(self.path, map_location="cpu")
            for key, module in modules.items():
                module.load_state_dict(stored[key])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.step = stored["step"]

    def save(self) -> None:
        stored = {key: module.state_dict() for key, module in self.modules.items()}
        part = self.path.with_suffix(".part")
        torch.save({**stored, "optimizer": self.optimizer.state_dict(), "step": self.step}, part)
        os.replace(part, self.path)

    def update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1


def note(**values: object) -> None:
    """One line of the learning curve."""
    line = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()})
    with CURVE.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def train_tower(model: Any, scenes: Scenes, held_out: Scenes, settings: Settings, until: float, device: torch.device) -> bool:
    """Whether it came to its end."""
    tower = model.model.vision_tower
    heads = TowerHeads().to(device)
    run = Run("tower", {"tower": tower, "heads": heads}, settings)
    see = lambda pixels: tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]  # noqa: E731
    began, seen_at = time.monotonic(), run.step
    for rows, rng in orders(len(scenes.images), settings.batch, 1, run.step, settings.steps):
        flip = rng.random(len(rows)) < 0.5
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = heads.loss(see(pixels_of(scenes, rows, flip, device)), patches_of(scenes, rows, flip, device))
        run.update(loss)
        if run.step % 250 == 0 or run.step == settings.steps:
            test = np.arange(500)
            with torch.no_grad():
                still = np.zeros(500, bool)
                valid, told = heads.loss(see(pixels_of(held_out, test, still, device)), patches_of(held_out, test, still, device))
            speed = (run.step - seen_at) * settings.batch / (time.monotonic() - began)
            note(part="tower", step=run.step, loss=float(loss.detach()), held_out=float(valid), **told, scenes_per_s=speed)
            run.save()
        if time.monotonic() > until:
            run.save()
            return run.step >= settings.steps
    return True


def train_answers(model: Any, tokenizer: Any, scenes: Scenes, held_out: Scenes, settings: Settings, until: float, device: torch.device, per_scene: int) -> bool:
    """Whether it came to its end."""
    heads, pointer = TowerHeads().to(device), Pointer().to(device)
    stored = torch.load(SCRATCH / "tower.pt", map_location="cpu")
    model.model.vision_tower.load_state_dict(stored["tower"])
    heads.load_state_dict(stored["heads"])
    run = Run("answers", {"model": model, "heads": heads, "pointer": pointer}, settings)
    questions = Questions(scenes, tokenizer, per_scene)
    asked = Questions(held_out, tokenizer, 6)
    row_of, soft = smoothed_targets(questions, model.config.text_config.vocab_size, device)

    def losses(source: Questions, rows: NDArray[np.int64], flip: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = source.batch(rows, flip, rng, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            patches = model.model.vision_tower(pixels_of(source.scenes, rows, flip, device), output_hidden_states=True).hidden_states[-1][:, 1:]
            dense, told = heads.loss(patches, patches_of(source.scenes, rows, flip, device))
            embedded = model.get_input_embeddings()(batch["ids"])
            image = model.model.multi_modal_projector(patches).to(embedded.dtype)
            embedded = torch.cat([embedded[:, :1], image, embedded[:, 1 + GRID * GRID :]], dim=1)
            hidden = model.model.language_model(
                inputs_embeds=embedded,
                attention_mask=mask_of(batch["group"], embedded.dtype),
                position_ids=batch["position"],
                use_cache=False,
            ).last_hidden_state
            words, numbers = answer_loss(model.lm_head(hidden), batch["labels"], row_of, soft)
            pointing, hit = pointer.loss(hidden, batch["joint"], batch["pointed"])
        parts = {"words": float(words.detach()), "numbers": float(numbers.detach()), "pointed": hit, "shape": told["shape"]}
        return words + 2 * numbers + pointing + 0.5 * dense, parts

    began, seen_at = time.monotonic(), run.step
    for rows, rng in orders(len(scenes.images), settings.batch, 2, run.step, settings.steps):
        loss, parts = losses(questions, rows, rng.random(len(rows)) < 0.5, rng)
        run.update(loss)
        if run.step % 250 == 0 or run.step == settings.steps:
            with torch.no_grad():
                _, valid = losses(asked, np.arange(100), np.zeros(100, bool), np.random.default_rng(0))
            speed = (run.step - seen_at) * settings.batch / (time.monotonic() - began)
            note(part="answers", step=run.step, loss=float(loss.detach()), **{f"held_out_{k}": v for k, v in valid.items()}, train_pointed=parts["pointed"], scenes_per_s=speed)
            run.save()
        if time.monotonic() > until:
            run.save()
            return run.step >= settings.steps
    return True


def _name_as_on_the_hub(file: Path) -> None:
    """The tower's weights under the names that LLaVAs of the hub have: vLLM knows no others, transformers both."""
    weights = load_file(file)
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}
    save_file(named, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--tower-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tower-batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=8, help="of a scene at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=1e9, help="after which it stops, to go on at the next call")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    SCRATCH.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    scenes = read_scenes(stored_scenes(SCRATCH / "scenes", range(args.shards), args.workers))
    held_out = read_scenes(stored_scenes(SCRATCH / "scenes", [HELD_OUT_SHARD], 1))
    print(f"{len(scenes.images)} scenes, {len(scenes.sentences)} sentences", flush=True)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlavaForConditionalGeneration(make_config(len(tokenizer)))
    starting_positions(model)
    model.to(device)
    done = train_tower(model, scenes, held_out, Settings(args.tower_steps, args.tower_batch, args.rate), until, device)
    if done:
        done = train_answers(model, tokenizer, scenes, held_out, Settings(args.steps, args.batch, args.rate), until, device, args.questions)
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    _name_as_on_the_hub(FOLDER / "model.safetensors")
    make_processor(tokenizer).save_pretrained(FOLDER)
    print("done" if done else "stopped; the same call goes on", flush=True)


if __name__ == "__main__":
    main()
