"""Measure the time and memory of a training step and of labeling a sentence, on a few pairs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.config import Params
from l2l_core.core.device import choose_device
from l2l_core.core.files import CODE_ROOT
from l2l_core.core.images import read_image
from l2l_core.core.masks import BoolMask
from l2l_core.core.threads import thread_count
from l2l_core.data.pairs import BatchMaker, Pairs, Targets, load_pairs, load_targets
from l2l_core.data.views import Views
from l2l_core.errors import ConfigError
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.model.sam import Prompts, Sam
from l2l_core.model.segmenter import Segmenter
from l2l_core.preflight.backends import sam_device
from l2l_core.preflight.estimate import VIEWS, Costs, MemoryCosts
from l2l_core.preflight.memory import peak_of
from l2l_core.priors.fit import unfitted
from l2l_core.priors.renderers import grabcut_input, render_box, render_grabcut
from l2l_core.pseudo_labels.candidates import build_candidates
from l2l_core.pseudo_labels.features import LABEL_THRESHOLD, Candidates, compute_features, score_candidates
from l2l_core.pseudo_labels.reinforce import train_policy
from l2l_core.training.loop import train
from l2l_core.training.runs import part_of
from l2l_core.training.streams import Stream, stream_sizes

TRAINING_STEPS = 5
"""Steps measured after a first one, which includes one-time setup; their median counts."""
POLICY_STEPS = 20
BUDGET_S = 12.0
"""Limit for training, and again for labeling: with the rest, a check takes about half a minute at most."""
RENDERED = 4
"""Images segmented by GrabCut: each takes tens of milliseconds."""
PROMPTS = 8
"""Prompts of SAM about an image: RefCOCO's images have about as many sentences."""

LIGHT_MODULE, NETWORK_MODULE = "l2l_core.mllm.query", "l2l_core.pseudo_labels.generate"
"""Modules imported by stages without the network, and with it."""


T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Some pairs with their true masks, and their true boxes in place of priors."""

    pairs: Pairs
    targets: Targets
    box_xyxy: NDArray[np.float64]  # [N, 4] pixels


def take_sample(params: Params, index: records.IndexPaths, sent_ids: list[int]) -> Sample:
    """The sample of the given sentences, which must have masks."""
    wanted = np.array(sent_ids, dtype=np.int64)
    settings = params.proposals
    pairs = load_pairs(index, wanted, None, None, settings.size_px, settings.flat_prob)
    refs = records.to_frame(records.read_table(index.refs, records.REFS, ["sent_id", "bbox"])).set_index("sent_id")
    box = np.stack(refs.loc[wanted, "bbox"].tolist()).astype(np.float64)
    soft = render_box(box, pairs.hw, settings)
    pairs = replace(
        pairs,
        box=(box / np.tile(pairs.hw[:, ::-1], 2)).astype(np.float32),
        has_box=np.ones(len(pairs), dtype=bool),
        proposal=np.rint(soft * 255).astype(np.uint8),
        proposal_score=np.ones(len(pairs), dtype=np.float32),
    )
    return Sample(pairs, load_targets(index.masks, index, pairs), box)


def measure(
    params: Params, network: Segmenter, sample: Sample, read_s: float, read_bytes: int, sam_folder: str | None = None
) -> tuple[Costs, MemoryCosts]:
    """Measure costs with a few training steps and predictions.

    read_s, read_bytes: cost of reading the dataset. sam_folder: of SAM's model, if the run uses one. Raises ConfigError
    if the loss is not finite, a batch is too small, or the GPU's memory is too small.
    """
    device = choose_device(params.train.engine.device)
    with peak_of(device) as training, _explain_out_of_memory("train.engine.micro_batch_size"):
        step_s = _training_step_s(params, network, sample)
    network.zero_grad(set_to_none=True)
    # A forward pass takes about a third of a training step, which also runs backward.
    fits = int(BUDGET_S * params.train.batch_size / max(step_s, 1e-6))
    count = max(1, min(len(sample.pairs), params.evaluate.batch_size, fits))
    rows = np.arange(count)
    batches = _batches(params, sample.pairs.take(rows))
    images = np.unique(batches.pairs.image_row)
    decode_s = _timed(lambda: batches.pixels(images))[1] / len(images)  # from now on they are in memory
    with peak_of(device) as predict_peak, _explain_out_of_memory("evaluate.batch_size"):
        predictor = BatchPredictor.of(network, params.train)
        (_, views), view_s = _timed(lambda: next(predictor.views(batches, count, "check")))
        predict_s = view_s / VIEWS / count
        # An untrained network's masks are noise, and GrabCut's time on noise differs from its time on an object.
        seen = replace(views, prob=views.proposal, prob_flipped=views.proposal)
        (masks, candidates), label_s = _timed(lambda: _label(params, seen))
        _, masks_s = _timed(lambda: predictor.masks(batches, count, [True], "check"))
    policy_s = 0.0
    if params.select.trains_policy:
        truth = batches.square_masks(sample.targets.take(rows).label, rows)
        scores = score_candidates(views.sent_id, masks, truth, params.select.grid)
        # A step repeats the same work for unlabeled sentences, unless their reliability is unknown.
        select = params.select.model_copy(update={"policy_steps": POLICY_STEPS, "unlabeled_weight": 0.0})
        _, policy_s = _timed(lambda: train_policy(candidates, scores, candidates, select, params.seed))
    with peak_of(device) as by_sam, _explain_out_of_memory("proposals.model"):
        sam_image_s, sam_prompt_s = (None, None) if sam_folder is None else _sam_s(params, sample, sam_folder)
    (start_s, start), (network_start_s, network_start) = _start(LIGHT_MODULE), _start(NETWORK_MODULE)
    costs = Costs(
        start_s=start_s,
        network_start_s=network_start_s,
        read_s=read_s,
        decode_s=decode_s,
        proposal_s=_proposal_s(params, sample),
        step_s=step_s,
        predict_s=predict_s,
        label_s=label_s / count,
        mask_s=max(0.0, masks_s / count - predict_s),
        policy_step_s=2 * policy_s / POLICY_STEPS,
        sam_image_s=sam_image_s,
        sam_prompt_s=sam_prompt_s,
    )
    whole = params.evaluate.batch_size / count  # stages pad their batches
    needs = MemoryCosts(
        start=start,
        network_start=network_start,
        read=read_bytes,
        train=training.ram_bytes,
        predict=round(whole * predict_peak.ram_bytes),
        state=sum(getattr(candidates, field.name).nbytes for field in fields(candidates)) / count,
        train_gpu=training.gpu_bytes,
        predict_gpu=None if predict_peak.gpu_bytes is None else round(whole * predict_peak.gpu_bytes),
        sam=by_sam.ram_bytes,
        sam_gpu=by_sam.gpu_bytes,
    )
    return costs, needs


@contextmanager
def _explain_out_of_memory(key: str) -> Iterator[None]:
    """Raises ConfigError that names a parameter if the GPU runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(f"params.yaml: {key}: the GPU's memory is not enough for a batch; lower it") from None


class _TimeBudgetReached(Exception):
    """Ends a training with slow steps."""


def _training_step_s(params: Params, network: Segmenter, sample: Sample) -> float:
    share = params.retrain.labeled_share if params.round else 1.0
    everything = Stream(_batches(params, sample.pairs), sample.targets, share)
    streams = [everything, replace(everything, share=1 - share)] if params.round else [everything]
    # So few pairs that the first step, which does not count, decodes all images.
    sizes = [min(size, len(sample.pairs)) for size in stream_sizes(streams, params.train.batch_size)]
    streams = [part_of(stream, np.arange(size)) for stream, size in zip(streams, sizes, strict=True)]
    stamps = [time.monotonic()]

    def log(_: dict[str, float]) -> None:
        stamps.append(time.monotonic())
        if stamps[-1] - stamps[0] > BUDGET_S:
            raise _TimeBudgetReached

    settings = params.train.model_copy(update={"log_every": 1})
    with suppress(_TimeBudgetReached):
        train(network, streams, 1 + TRAINING_STEPS, settings, seed=params.seed, run_name="check", log=log)
    steps = np.diff(stamps)
    return float(np.median(steps[1:] if len(steps) > 1 else steps))


def _batches(params: Params, pairs: Pairs) -> BatchMaker:
    return BatchMaker(pairs, params.model.image_size_px, params.proposals.flat_prob)


def _label(params: Params, views: Views) -> tuple[BoolMask, Candidates]:
    names = params.select.candidate_names
    stand_in = views.proposal > LABEL_THRESHOLD  # SAM itself is measured apart, and a neighbor costs nothing
    masks = build_candidates(views, names, stand_in, stand_in)
    return masks, compute_features(views, masks, names, params.select.grid)


def _proposal_s(params: Params, sample: Sample) -> float:
    """Seconds per sentence, with threads working in parallel; drawing a box takes far less than a millisecond."""
    if params.proposals.renderer != "grabcut":
        return 0.0
    paths, rows = sample.pairs.image_path, range(min(RENDERED, len(sample.pairs)))
    settings = unfitted(params.proposals)
    images = [read_image(paths[sample.pairs.image_row[row]]) for row in rows]

    def render() -> None:
        for row, image in zip(rows, images, strict=True):
            small, size = grabcut_input(image), (image.shape[0], image.shape[1])
            render_grabcut(small, sample.box_xyxy[row], size, settings)

    return _timed(render)[1] / len(rows) * params.priors.samples / thread_count()


def _sam_s(params: Params, sample: Sample, folder: str) -> tuple[float, float]:
    """Seconds per image and per prompt, on one image; the first run also pays for what is set up once."""
    sam = Sam(folder, sam_device(params))
    path = sample.pairs.image_path[sample.pairs.image_row[0]]
    prompts = Prompts(np.repeat(sample.box_xyxy[:1], PROMPTS, axis=0), np.full((PROMPTS, 2), np.nan))

    def run() -> tuple[float, float]:
        (encoded,), image_s = _timed(lambda: sam.encode([read_image(path)]))
        _, prompts_s = _timed(lambda: sam.probabilities(sam.segment(encoded, prompts).logits, encoded, 8))
        return image_s, prompts_s / PROMPTS

    first = run()
    return first if sum(first) > BUDGET_S / 4 else run()


def _start(module: str) -> tuple[float, int]:
    """Seconds until a fresh Python has imported a module, and its memory in bytes after that."""
    code = f"import {module}, psutil; print(psutil.Process().memory_info().rss)"
    command = [sys.executable, "-c", code]
    done, seconds = _timed(lambda: subprocess.run(command, cwd=CODE_ROOT, check=True, stdout=subprocess.PIPE))
    return seconds, int(done.stdout.split()[-1])


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.monotonic()
    done = work()
    return done, time.monotonic() - started
