"""Tiny image-sentence pairs on disk, parameters for a network that trains within a test, and such a network."""

from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2l_core.config import ModelParams, Params, TrainEngineParams, TrainParams, load_params
from l2l_core.core.masks import encode_rle
from l2l_core.data.pairs import BatchMaker, Pairs, Targets
from l2l_core.model.segmenter import Segmenter

PARAMS_FILE = Path(__file__).resolve().parents[1] / "params.yaml"
SIZE_PX = 32
FLAT_PROB = 0.1
MODEL = ModelParams(
    image_encoder="tiny",
    text_encoder="tiny",
    image_size_px=SIZE_PX,
    dim=16,
    heads=2,
    guidance_tokens=2,
    max_text_tokens=12,
)
TRAIN = TrainParams(
    batch_size=4,
    lr=2e-3,
    encoder_lr_scale=0.1,
    weight_decay=0.05,
    warmup_fraction=0.1,
    lr_decay="cosine",
    grad_clip=1.0,
    ema_decay=0.9,
    prior_dropout=0.25,
    precision="fp32",
    flip=True,
    log_every=1,
    engine=TrainEngineParams(
        device="cpu",
        micro_batch_size=None,
        gradient_checkpointing=False,
        side_by_side=False,
        workers=0,
        checkpoint_every=2,
    ),
)


def toy_pairs(folder: Path, count: int = 4) -> tuple[Pairs, Targets]:
    """`count` pictures of different sizes, each with a light square on one side and the sentence that names the side.

    Every pair has a prior: the true box, a proposal that is 0.9 in it, and its sentence's words.
    """
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    paths, sizes, boxes, rles, sentences = [], [], [], [], []
    proposal = np.full((count, 16, 16), 26, np.uint8)
    for row in range(count):
        height, width = 40 + 4 * row, 60 - 2 * row
        side = "left" if row % 2 == 0 else "right"
        x = 4 + row if side == "left" else width - 24 - row
        mask = np.zeros((height, width), dtype=bool)
        mask[8:28, x : x + 18] = True
        image = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        image[mask] += 150
        paths.append(str(folder / f"{row}.png"))
        cv2.imwrite(paths[-1], image)
        sizes.append((height, width))
        boxes.append((x / width, 8 / height, (x + 18) / width, 28 / height))
        x1, y1, x2, y2 = (np.array(boxes[-1]) * 16).round().astype(int)
        proposal[row, y1:y2, x1:x2] = 230
        rles.append(encode_rle(mask))
        sentences.append(f"the square on the {side}")
    pairs = Pairs(
        sent_id=np.arange(count, dtype=np.int64) * 7 + 100,
        sentence=sentences,
        prior_text=[f"{text.split()[-1]} square" for text in sentences],
        image_row=np.arange(count, dtype=np.int64),
        image_path=paths,
        image_hw=np.array(sizes, dtype=np.int64),
        box=np.array(boxes, dtype=np.float32),
        has_box=np.ones(count, dtype=bool),
        proposal=proposal,
        proposal_score=np.ones(count, dtype=np.float32),
        predicted_iou=np.zeros(count, dtype=np.float32),
    )
    return pairs, Targets(rles)


def toy_batches(pairs: Pairs) -> BatchMaker:
    return BatchMaker(pairs, SIZE_PX, FLAT_PROB)


def toy_network(pairs: Pairs, seed: int = 0) -> Segmenter:
    network = Segmenter.create(MODEL, [*pairs.sentence, *pairs.prior_text], seed)
    network.precision_setting = "fp32"  # on any machine
    return network


def stirred_network(pairs: Pairs) -> Segmenter:
    """A network with structured masks and with gates that depend on the proposal."""
    network = toy_network(pairs).eval()
    torch.manual_seed(0)
    for parameter in network.decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def toy_params(**sections: dict[str, object]) -> Params:
    """The project's parameters with the tiny network, simulated priors, proposals as boxes, and some values changed:
    `select={"folds": 3}`."""
    params = load_params(PARAMS_FILE)
    priors = params.priors.model_copy(update={"backend": "simulated"})
    proposals = params.proposals.model_copy(update={"renderer": "box", "ring": 0.1, "core": 0.0})
    params = params.model_copy(update={"model": MODEL, "train": TRAIN, "priors": priors, "proposals": proposals})
    changed = {name: getattr(params, name).model_copy(update=values) for name, values in sections.items()}
    return params.model_copy(update=changed)


def rows_of(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)
