"""How long a training step and the labelling of a sentence take, measured on a few pairs of the data set."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from l2l_core import proposals, records
from l2l_core.config import Params
from l2l_core.data.dataset import BatchMaker, Pairs, Targets, load_pairs, load_targets
from l2l_core.data.images import read_image
from l2l_core.engine.loop import Stream, train
from l2l_core.engine.resume import CODE_ROOT
from l2l_core.masks import BoolMask
from l2l_core.model.segmenter import Segmenter
from l2l_core.predictor import Predictor
from l2l_core.preflight.estimate import VIEWS, Costs
from l2l_core.selection.construct import construct
from l2l_core.selection.features import Candidates, Views, describe, judge
from l2l_core.selection.reinforce import train_policy

TRAINING_STEPS = 5
"""Measured after a first one, which pays for whatever is made once; their median counts."""
POLICY_STEPS = 20
BUDGET_S = 12.0
"""For training, and again for labelling: with the rest, a check takes about half a minute at most."""
RENDERED = 4
"""Images that are fitted by GrabCut: each takes tens of milliseconds."""

LIGHT_MODULE, NETWORK_MODULE = "l2l_core.data.source", "l2l_core.engine.labeling"
"""What stages import that do without the network, and with it."""


T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Some pairs with their true masks, and with their true boxes in the place of priors."""

    pairs: Pairs
    targets: Targets
    box_xyxy: NDArray[np.float64]  # [N, 4] pixels


def take_sample(params: Params, index: records.IndexPaths, sent_ids: list[int]) -> Sample:
    """The sample of some sentences that have masks."""
    wanted = np.array(sent_ids, dtype=np.int64)
    settings = params.proposals
    pairs = load_pairs(index, wanted, None, None, settings.size_px, settings.flat_prob)
    refs = records.to_frame(records.read_table(index.refs, records.REFS, ["sent_id", "bbox"])).set_index("sent_id")
    box = np.stack(refs.loc[wanted, "bbox"].tolist()).astype(np.float64)
    soft = proposals.render_box(box, pairs.hw, settings)
    pairs = replace(
        pairs,
        box=(box / np.tile(pairs.hw[:, ::-1], 2)).astype(np.float32),
        has_box=np.ones(len(pairs), dtype=bool),
        proposal=np.rint(soft * 255).astype(np.uint8),
        proposal_score=np.ones(len(pairs), dtype=np.float32),
    )
    return Sample(pairs, load_targets(index.masks, index, pairs), box)


def measure(params: Params, network: Segmenter, sample: Sample, read_s: float) -> Costs:
    """Train and label a little. Raises ConfigError where the loss is not finite or a batch is too small."""
    step_s = _training_step_s(params, network, sample)
    predictor = Predictor.of(network, params.train)
    # Asking takes about a third of a training step, which also goes back through the network.
    fits = int(BUDGET_S * params.train.batch_size / max(step_s, 1e-6))
    count = max(1, min(len(sample.pairs), params.evaluate.batch_size, fits))
    rows = np.arange(count)
    batches = _batches(params, sample.pairs.take(rows))
    (_, views), view_s = _timed(lambda: next(predictor.views(batches, count, "check")))
    ask_s = view_s / VIEWS / count
    # An untrained network's masks are noise, which GrabCut takes another time for than for an object.
    seen = replace(views, prob=views.proposal, prob_flipped=views.proposal)
    (masks, candidates), label_s = _timed(lambda: _label(params, seen))
    _, masks_s = _timed(lambda: predictor.masks(batches, count, [True], "check"))
    policy_s = 0.0
    if params.select.policy == "reinforce":
        truth = batches.square_masks(sample.targets.take(rows).label, rows)
        outcome = judge(views.sent_id, masks, truth, params.select.grid)
        # A step does the same again to unlabelled sentences, unless nothing is known of how far to trust them.
        select = params.select.model_copy(update={"policy_steps": POLICY_STEPS, "unlabeled_weight": 0.0})
        _, policy_s = _timed(lambda: train_policy(candidates, outcome, candidates, select, params.seed))
    return Costs(
        start_s=_start_s(LIGHT_MODULE),
        network_start_s=_start_s(NETWORK_MODULE),
        read_s=read_s,
        proposal_s=_proposal_s(params, sample),
        step_s=step_s,
        ask_s=ask_s,
        label_s=label_s / count,
        mask_s=max(0.0, masks_s / count - ask_s),
        policy_step_s=2 * policy_s / POLICY_STEPS,
    )


class _EnoughError(Exception):
    """Ends a training whose steps take long."""


def _training_step_s(params: Params, network: Segmenter, sample: Sample) -> float:
    share = params.retrain.labeled_share if params.round else 1.0
    labeled = Stream(_batches(params, sample.pairs), sample.targets, share)
    streams = [labeled, replace(labeled, share=1 - share)] if params.round else [labeled]
    stamps = [time.monotonic()]

    def log(_: dict[str, float]) -> None:
        stamps.append(time.monotonic())
        if stamps[-1] - stamps[0] > BUDGET_S:
            raise _EnoughError

    settings = params.train.model_copy(update={"log_every": 1})
    with suppress(_EnoughError):
        train(network, streams, 1 + TRAINING_STEPS, settings, params.seed, "check", None, log)
    steps = np.diff(stamps)
    return float(np.median(steps[1:] if len(steps) > 1 else steps))


def _batches(params: Params, pairs: Pairs) -> BatchMaker:
    return BatchMaker(pairs, params.model.image_size_px, params.proposals.flat_prob)


def _label(params: Params, views: Views) -> tuple[BoolMask, Candidates]:
    names = params.select.constructed
    masks = construct(views, names)
    return masks, describe(views, masks, names, params.select.grid)


def _proposal_s(params: Params, sample: Sample) -> float:
    """Seconds of a sentence; boxes are drawn in far less than a millisecond."""
    if params.proposals.renderer == "box":
        return 0.0
    paths, rows = sample.pairs.image_path, range(min(RENDERED, len(sample.pairs)))
    images = [read_image(paths[sample.pairs.image_row[row]])[..., ::-1] for row in rows]

    def render() -> None:
        for row, image in zip(rows, images, strict=True):
            proposals.render_grabcut(np.ascontiguousarray(image), sample.box_xyxy[row], params.proposals)

    return _timed(render)[1] / len(rows) * params.priors.samples


def _start_s(module: str) -> float:
    """Until a fresh Python has imported a module."""
    return _timed(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], cwd=CODE_ROOT, check=True))[1]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.monotonic()
    done = work()
    return done, time.monotonic() - started
