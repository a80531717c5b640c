"""Stages of a run, with estimates of their time in seconds and of their outputs and memory in bytes.

docs/check.md explains the formulas. Nothing here reads a file, measures or raises.
"""

from __future__ import annotations

from dataclasses import dataclass

from l2l_core.config import Params
from l2l_core.core.images import IMAGE_CACHE_BYTES
from l2l_core.priors.fit import renderings_of_fit
from l2l_core.priors.proposals import CHUNK_CELLS

VIEWS = 3
"""Forward passes of a teacher per sentence that it labels: with prior, mirrored, without prior."""
RESPONSE_BYTES = 500
"""Size of a response, raw plus parsed: the prompt's JSON has about 300 characters, and zstd shrinks it."""
ROW_BYTES = 50
"""Size of a table row without its masks: a dozen numbers."""
MAP_COPIES = 4
"""Copies of all proposals while a stage reads them: the table, its rows, the rows in the stage's order, their array."""
RENDERED_BYTES = 24
"""Memory per cell of the maps that are rendered at once: three numbers of 8 bytes."""
TEXT_BYTES = 1_000
"""Memory of a sentence with its response and ids: a dozen Python objects."""
CHECKPOINT_MODELS = 4
"""A checkpoint holds student and teacher, and two moments of each weight."""


@dataclass(frozen=True)
class Counts:
    """Numbers of sentences and images, each at least 0."""

    sentences: int  # of all roles: each is queried and rendered
    labeled: int  # sentences
    unlabeled: int
    evaluated: int
    labeled_images: int  # images of the labeled sentences
    unlabeled_images: int
    evaluated_images: int


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on a sample by `measure.py`, each at least 0.

    A pass is one forward pass of the network; a prediction makes `retrain.num_passes` of them.
    """

    start_s: float  # startup of a stage without the network
    network_start_s: float  # startup of a stage with the network
    read_s: float  # the whole dataset
    decode_s: float  # per image, read and resized for the network
    proposal_s: float  # per sentence
    step_s: float  # per training step, on decoded images
    predict_s: float  # per sentence about a decoded image, one view, one pass
    label_s: float  # per sentence: its candidates and the policy's features
    mask_s: float  # per mask at its image's size, as run lengths
    policy_step_s: float  # per step of the policy's training
    sam_image_s: float | None = None  # per image, read and encoded by SAM; None: SAM is not measured
    sam_prompt_s: float | None = None  # per prompt about an encoded image


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk, measured on a sample by `measure.py`, each at least 0."""

    index: int  # all tables of ingest
    mask: float  # run lengths of one mask
    model: int | None  # the network's weights; None: its encoders are not on this machine


@dataclass(frozen=True)
class MemoryCosts:
    """Bytes of memory at the peak, measured on a sample by `measure.py`, each at least 0.

    RAM unless the name ends in `_gpu`. A part is what is added to the parts it starts from: a training needs
    `network_start`, the weights, `train` and its decoded images.
    """

    start: int  # process without the network, after startup
    network_start: int  # process with the network, after startup
    read: int  # reading the whole dataset
    train: int  # training, without the network's weights
    predict: int  # labeling a batch, without the network's weights
    state: float  # the policy's features, per sentence
    train_gpu: int | None  # total on the GPU; None: the network runs on the CPU
    predict_gpu: int | None  # the same, for labeling a batch
    sam: int = 0  # SAM with its weights, while it encodes and decodes
    sam_gpu: int | None = None  # the same, for SAM


@dataclass(frozen=True)
class Stage:
    """One stage of a run, with its estimates; each is at least 0."""

    name: str  # DVC's name
    seconds: float | None  # None: unknown
    size_bytes: float | None  # of its outputs; None: unknown
    ram_bytes: float | None  # of all its processes; None: unknown
    gpu_bytes: float | None  # of one GPU; None: unknown, or no GPU is used


def stage_names(params: Params, *, draws_refshapes: bool) -> list[str]:
    """DVC's names of the stages that `dvc repro` runs from scratch, in an order in which they can run.

    params: `round` is the number of rounds after the warm-up. draws_refshapes: whether the built-in dataset is drawn.
    """
    names = ["check", *(["refshapes"] if draws_refshapes else []), "ingest", "split", "query", "priors", "proposals"]
    names += ["warmup", "predict"]
    for round_number in range(1, params.round + 1):
        names += ["crossfit-0" if round_number == 1 else f"crossfit@{round_number - 1}"]
        names += [f"select@{round_number}", f"retrain@{round_number}", f"predict@{round_number}"]
    return [*names, "distill", "predict-distilled", "evaluate", "report"]


def plan(
    params: Params,
    counts: Counts,
    costs: Costs | None,
    sizes: Sizes,
    *,
    draws_refshapes: bool,
    needs: MemoryCosts | None = None,
    at_once: int = 1,
) -> list[Stage]:
    """Estimate every stage of a run, in the order of `stage_names`.

    costs: in seconds; None: all `seconds` are None. sizes: in bytes on disk. needs: in bytes of memory; None: all
    `ram_bytes` and `gpu_bytes` are None. draws_refshapes: as in `stage_names`. at_once: number of fold teachers that
    train in parallel, at least 1.
    """
    stages = []
    for name in stage_names(params, draws_refshapes=draws_refshapes):
        seconds = None if costs is None else _seconds(name, params, counts, costs)
        ram, gpu = (None, None) if needs is None else _memory(name, params, counts, sizes, needs, at_once)
        stages.append(Stage(name, seconds, _bytes(name, params, counts, sizes), ram, gpu))
    return stages


def checkpoint_bytes(sizes: Sizes) -> int | None:
    """Bytes of .scratch/ at the peak of a training: a checkpoint, and the next one while it is written.

    None if the size of the network is unknown.
    """
    return None if sizes.model is None else 2 * CHECKPOINT_MODELS * sizes.model


def _seconds(name: str, params: Params, counts: Counts, costs: Costs) -> float | None:
    kind, round_number = _parse(name)
    select, learns = params.select, params.select.trains_policy
    start, step_s = costs.network_start_s, costs.step_s
    passes = params.retrain.num_passes if round_number or (kind == "predict-distilled" and params.round) else 1
    decode_s, folds = costs.decode_s, select.folds
    match kind:
        case "check" | "split" | "priors":
            return costs.start_s
        case "ingest":
            return costs.start_s + costs.read_s
        case "query":  # a model's speed is not measured here
            return costs.start_s if params.priors.backend in ("simulated", "replay", "none") else None
        case "proposals":
            images = counts.labeled_images + counts.unlabeled_images + counts.evaluated_images
            if params.proposals.renderer == "sam":
                rendering_s = _sam_seconds(costs, images, counts.sentences * params.priors.samples)
                return None if rendering_s is None else start + rendering_s
            if params.proposals.renderer == "box":
                return costs.start_s + counts.sentences * costs.proposal_s
            rendered = counts.sentences + renderings_of_fit(params.proposals, counts.labeled)
            return costs.start_s + rendered * costs.proposal_s + images * decode_s
        case "warmup":  # with priors and without
            steps = params.warmup.steps
            return start + 2 * (steps * step_s + decode_s * _decoded(params, counts, steps, rounds=False))
        case "crossfit-0" if not select.uses_fold_teachers:
            return costs.start_s
        case "crossfit-0":
            steps = select.fold_steps
            return start + folds * (steps * step_s + decode_s * _decoded(params, counts, steps, rounds=False))
        case "crossfit":
            if not select.uses_fold_teachers or select.fold_update == "freeze":
                return costs.start_s
            steps = select.fold_update_steps if select.fold_update == "continue" else select.fold_steps
            return start + folds * (steps * step_s + decode_s * _decoded(params, counts, steps, rounds=True))
        case "select":
            passes = params.retrain.num_passes if round_number > 1 else 1  # of the teacher, from the previous round
            each = VIEWS * passes * costs.predict_s + costs.label_s + len(select.candidate_names) * costs.mask_s
            num_scored = counts.labeled if learns else 0
            policy_s = select.policy_steps * costs.policy_step_s if learns else 0.0
            images = counts.unlabeled_images + (counts.labeled_images if learns else 0)
            by_sam: float | None = 0.0
            if select.uses_sam(params.proposals.model):
                from l2l_core.model.sam import POINTS_PER_SIDE  # not at the top: it loads PyTorch

                points = POINTS_PER_SIDE**2 * images  # of the automatic masks
                prompts = points if select.method == "semires" else counts.unlabeled + num_scored
                by_sam = _sam_seconds(costs, images, prompts)
            if by_sam is None:
                return None
            return start + (counts.unlabeled + num_scored) * each + images * decode_s + policy_s + by_sam
        case "retrain" | "distill":
            rounds = params.round > 0
            if rounds and select.method == "mean_teacher":  # the teacher labels its share of every batch
                step_s += (1 - params.retrain.labeled_share) * params.train.batch_size * costs.predict_s
            steps = params.retrain.steps if kind == "retrain" else params.distill.steps
            return start + steps * step_s + decode_s * _decoded(params, counts, steps, rounds=rounds)
        case "predict" | "predict-distilled":
            # With and without prior; round 0 also the supervised model; the distilled model only without prior.
            ways = 1 if kind == "predict-distilled" else 2 if round_number else 3
            filled = -(-counts.evaluated // params.evaluate.batch_size) * params.evaluate.batch_size
            models = 2 if name == "predict" else 1
            read = models * counts.evaluated_images * decode_s
            return start + ways * (filled * passes * costs.predict_s + counts.evaluated * costs.mask_s) + read
        case _:
            return None  # drawing, evaluating, reporting: not measured


def _sam_seconds(costs: Costs, images: int, prompts: int) -> float | None:
    """Time of SAM for prompts about images; None if it was not measured."""
    if costs.sam_image_s is None or costs.sam_prompt_s is None:
        return None
    return images * costs.sam_image_s + prompts * costs.sam_prompt_s


def _decoded(params: Params, counts: Counts, steps: int, *, rounds: bool) -> float:
    """Number of image decodes in training: each cached image once, and every other image again at each draw."""
    decodes, draws = 0.0, steps * params.train.batch_size
    for images, share, room in _streams(params, counts, rounds=rounds):
        kept = min(1.0, room / max(1, images))
        decodes += (1 - kept) * share * draws + kept * min(images, share * draws)
    return decodes


def _streams(params: Params, counts: Counts, *, rounds: bool) -> list[tuple[int, float, int]]:
    """Images, share of a batch and number of cached images, for each stream of a training."""
    room = IMAGE_CACHE_BYTES // (3 * params.model.image_size_px**2)
    if not rounds:
        return [(counts.labeled_images, 1.0, room)]
    share = params.retrain.labeled_share
    return [(counts.labeled_images, share, room // 2), (counts.unlabeled_images, 1 - share, room // 2)]


def _memory(
    name: str, params: Params, counts: Counts, sizes: Sizes, needs: MemoryCosts, at_once: int
) -> tuple[float | None, float | None]:
    """RAM of all processes of a stage, and memory of one GPU."""
    kind, round_number = _parse(name)
    select, image_bytes = params.select, 3 * params.model.image_size_px**2
    tables = counts.sentences * (MAP_COPIES * params.proposals.size_px**2 + TEXT_BYTES)
    network = needs.network_start + tables + (sizes.model or 0)
    learns, has_folds = select.trains_policy, select.uses_fold_teachers

    def training(beside: int, *, rounds: bool) -> float:
        kept = sum(min(images, room // beside) for images, _, room in _streams(params, counts, rounds=rounds))
        return beside * (network + needs.train + kept * image_bytes)

    def predict_bytes(images: int) -> float:
        return network + needs.predict + min(images * image_bytes, IMAGE_CACHE_BYTES)

    match kind:
        case "query" if params.priors.backend not in ("simulated", "replay", "none"):
            return None, None
        case "ingest" | "split" | "query" | "priors":
            return needs.start + needs.read, None
        case "proposals":
            cells = counts.sentences * params.priors.samples * params.proposals.size_px**2
            rendered = tables + RENDERED_BYTES * min(cells, CHUNK_CELLS)
            if params.proposals.renderer == "sam":
                return needs.network_start + rendered + needs.sam, needs.sam_gpu
            return needs.start + rendered, None
        case "crossfit-0" | "crossfit" if not has_folds or (round_number and select.fold_update == "freeze"):
            return needs.start, None
        case "warmup":  # with priors and without
            return training(min(2, at_once), rounds=False), needs.train_gpu
        case "crossfit-0":
            return training(at_once, rounds=False), needs.train_gpu
        case "crossfit":
            return training(at_once, rounds=True), needs.train_gpu
        case "retrain":
            return training(at_once if has_folds else 1, rounds=True), needs.train_gpu
        case "distill":
            return training(1, rounds=params.round > 0), needs.train_gpu
        case "select":  # the batches' states, and all of them in one array
            states = 2 * needs.state * (counts.unlabeled + (counts.labeled if learns else 0))
            if not select.uses_sam(params.proposals.model):
                return predict_bytes(counts.unlabeled_images) + states, needs.predict_gpu
            on_gpu = None if needs.predict_gpu is None else needs.predict_gpu + (needs.sam_gpu or 0)
            return predict_bytes(counts.unlabeled_images) + states + needs.sam, on_gpu
        case "predict" | "predict-distilled":
            return predict_bytes(counts.evaluated_images), needs.predict_gpu
        case _:
            return None, None  # drawing, evaluating, reporting: not measured


def _bytes(name: str, params: Params, counts: Counts, sizes: Sizes) -> float | None:
    kind, round_number = _parse(name)
    labels = counts.unlabeled * (2 * sizes.mask + ROW_BYTES)
    match kind:
        case "ingest":
            return sizes.index
        case "split":
            return counts.labeled * (sizes.mask + ROW_BYTES)
        case "query" | "priors":
            return counts.sentences * params.priors.samples * RESPONSE_BYTES
        case "proposals":
            return counts.sentences * params.proposals.size_px**2
        case "warmup":
            return None if sizes.model is None else 2 * sizes.model
        case "retrain" | "distill":
            return sizes.model
        case "crossfit-0" | "crossfit" if not params.select.uses_fold_teachers:
            return 0
        case "crossfit-0" | "crossfit":
            return None if sizes.model is None else params.select.folds * sizes.model
        case "select":
            return labels
        case "predict":  # predictions and selections of this and all earlier rounds
            return counts.evaluated * (3 + 2 * round_number) * (sizes.mask + ROW_BYTES) + round_number * labels
        case "predict-distilled":  # the last round's, and one more prediction
            return counts.evaluated * (4 + 2 * params.round) * (sizes.mask + ROW_BYTES) + params.round * labels
        case _:
            return None


def _parse(name: str) -> tuple[str, int]:
    """select@2 -> select, 2; warmup -> warmup, 0."""
    kind, _, round_number = name.partition("@")
    return kind, int(round_number or 0)
