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
DATA_BATCHES = 3
"""Batches in memory for each data worker: `training.workers.AHEAD`, and one on its way."""
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
class Machine:
    """Where the costs were measured, and where the stages start."""

    cores: int  # usable ones
    threads: int  # of one process
    has_gpu: bool  # the networks run on GPUs
    sam_has_gpu: bool = False  # so does the SAM that renders proposals


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
    machine: Machine | None = None,
) -> list[Stage]:
    """Estimate every stage of a run, in the order of `stage_names`.

    costs: in seconds; None: all `seconds` are None. sizes: in bytes on disk. needs: in bytes of memory; None: all
    `ram_bytes` and `gpu_bytes` are None. draws_refshapes: as in `stage_names`. at_once: number of fold teachers that
    train in parallel, at least 1. machine: None: all stages compute in one process.
    """
    stages = []
    for name in stage_names(params, draws_refshapes=draws_refshapes):
        seconds = None if costs is None else _seconds(name, params, counts, costs, machine)
        ram, gpu = (None, None) if needs is None else _memory(name, params, counts, sizes, needs, at_once, machine)
        stages.append(Stage(name, seconds, _bytes(name, params, counts, sizes), ram, gpu))
    return stages


def checkpoint_bytes(sizes: Sizes) -> int | None:
    """Bytes of .scratch/ at the peak of a training: a checkpoint, and the next one while it is written.

    None if the size of the network is unknown.
    """
    return None if sizes.model is None else 2 * CHECKPOINT_MODELS * sizes.model


def _seconds(name: str, params: Params, counts: Counts, costs: Costs, machine: Machine | None) -> float | None:
    kind, round_number = _parse(name)
    select, learns = params.select, params.select.trains_policy
    start, step_s = costs.network_start_s, costs.step_s
    passes = params.retrain.num_passes if round_number or (kind == "predict-distilled" and params.round) else 1
    decode_s, folds = costs.decode_s, select.folds

    def training(steps: int, step_s: float = costs.step_s, *, rounds: bool) -> float:
        helpers = _data_workers(params, machine, rounds=rounds)
        each = decode_s * _decoded(params, counts, steps, rounds=rounds, processes=max(1, helpers))
        if machine is None or not helpers:
            return steps * step_s + each
        return max(steps * step_s, each * max(1, helpers / machine.cores))  # they decode while it computes

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
                faster = _speedup(params, params.cluster.workers, machine, machine is not None and machine.sam_has_gpu)
                return None if rendering_s is None else start + rendering_s / faster
            faster = _speedup(params, params.cluster.workers, machine, False)
            if params.proposals.renderer == "box":
                return costs.start_s + counts.sentences * costs.proposal_s / faster
            fit_s = renderings_of_fit(params.proposals, counts.labeled) * costs.proposal_s
            return costs.start_s + fit_s + (counts.sentences * costs.proposal_s + images * decode_s) / faster
        case "warmup":  # with priors and without
            return start + 2 * training(params.warmup.steps, rounds=False)
        case "crossfit-0" if not select.uses_fold_teachers:
            return costs.start_s
        case "crossfit-0":
            return start + folds * training(select.fold_steps, rounds=False)
        case "crossfit":
            if not select.uses_fold_teachers or select.fold_update == "freeze":
                return costs.start_s
            steps = select.fold_update_steps if select.fold_update == "continue" else select.fold_steps
            return start + folds * training(steps, rounds=True)
        case "select":
            passes = params.retrain.num_passes if round_number > 1 else 1  # of the teacher, from the previous round
            each = VIEWS * passes * costs.predict_s + costs.label_s + len(select.candidate_names) * costs.mask_s

            def labeling(sentences: int, images: int) -> float | None:
                by_sam: float | None = 0.0
                if select.uses_sam(params.proposals.model):
                    from l2l_core.model.sam import POINTS_PER_SIDE  # not at the top: it loads PyTorch

                    points = POINTS_PER_SIDE**2 * images  # of the automatic masks
                    by_sam = _sam_seconds(costs, images, points if select.method == "semires" else sentences)
                return None if by_sam is None else sentences * each + images * decode_s + by_sam

            label_s = labeling(counts.unlabeled, counts.unlabeled_images)
            score_s = labeling(counts.labeled, counts.labeled_images) if learns else 0.0
            if label_s is None or score_s is None:
                return None
            policy_s = select.policy_steps * costs.policy_step_s if learns else 0.0
            return start + label_s / _speedup(params, _busy(params, counts.unlabeled), machine) + score_s + policy_s
        case "retrain" | "distill":
            rounds = params.round > 0
            if rounds and select.method == "mean_teacher":  # the teacher labels its share of every batch
                step_s += (1 - params.retrain.labeled_share) * params.train.batch_size * costs.predict_s
            steps = params.retrain.steps if kind == "retrain" else params.distill.steps
            return start + training(steps, step_s, rounds=rounds)
        case "predict" | "predict-distilled":
            # With and without prior; round 0 also the supervised model; the distilled model only without prior.
            ways = 1 if kind == "predict-distilled" else 2 if round_number else 3
            filled = -(-counts.evaluated // params.evaluate.batch_size) * params.evaluate.batch_size
            models = 2 if name == "predict" else 1
            read = models * counts.evaluated_images * decode_s
            predict_s = ways * (filled * passes * costs.predict_s + counts.evaluated * costs.mask_s)
            return start + (predict_s + read) / _speedup(params, _busy(params, counts.evaluated), machine)
        case _:
            return None  # drawing, evaluating, reporting: not measured


def _busy(params: Params, sentences: int) -> int:
    """Those of `cluster.workers` that get a chunk of so many sentences to label or predict."""
    if params.cluster.workers == 1:
        return 1
    from l2l_core.model.batch_predictor import chunk_rows  # not at the top: it loads PyTorch

    return max(1, min(params.cluster.workers, -(-sentences // chunk_rows(params.evaluate.batch_size))))


def _speedup(params: Params, workers: int, machine: Machine | None, has_gpu: bool | None = None) -> float:
    """How many times as fast as the measured process so many workers are.

    has_gpu: True if each worker has its own GPU. None: as in `Machine.has_gpu`. Without GPUs, the factor is the number
    of all workers' threads over the threads of the measured process. Workers of this machine share its cores.
    """
    if machine is None:
        return 1.0
    if machine.has_gpu if has_gpu is None else has_gpu:
        return workers
    threads = workers * (params.cluster.cpus_per_worker or machine.threads)
    if params.cluster.executor == "local" or params.cluster.address is None:
        threads = min(threads, max(machine.cores, machine.threads))
    return threads / machine.threads


def _data_workers(params: Params, machine: Machine | None, at_once: int = 1, *, rounds: bool) -> int:
    """Data workers of each of `at_once` trainings, if there is room for their batches (`training.workers`)."""
    if machine is None or (rounds and params.select.method == "mean_teacher"):
        return 0
    if params.train.engine.workers != "auto":
        return params.train.engine.workers
    if not machine.has_gpu:
        return 0
    from l2l_core.training.workers import MOST_WORKERS  # not at the top: it loads PyTorch

    return max(0, min(MOST_WORKERS, machine.cores // at_once - 1))


def _sam_seconds(costs: Costs, images: int, prompts: int) -> float | None:
    """Time of SAM for prompts about images; None if it was not measured."""
    if costs.sam_image_s is None or costs.sam_prompt_s is None:
        return None
    return images * costs.sam_image_s + prompts * costs.sam_prompt_s


def _decoded(params: Params, counts: Counts, steps: int, *, rounds: bool, processes: int = 1) -> float:
    """Number of image decodes in training: each cached image once, and every other image again at each draw.

    processes: equal ones, each with its share of the draws and of the cache; the number is that of one.
    """
    decodes, draws = 0.0, steps * params.train.batch_size / processes
    for images, share, room in _streams(params, counts, rounds=rounds):
        kept = min(1.0, room // processes / max(1, images))
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
    name: str,
    params: Params,
    counts: Counts,
    sizes: Sizes,
    needs: MemoryCosts,
    at_once: int,
    machine: Machine | None,
) -> tuple[float | None, float | None]:
    """RAM of all processes of a stage, and memory of one GPU."""
    kind, round_number = _parse(name)
    select, image_bytes = params.select, 3 * params.model.image_size_px**2
    tables = counts.sentences * (MAP_COPIES * params.proposals.size_px**2 + TEXT_BYTES)
    network = needs.network_start + tables + (sizes.model or 0)
    learns, has_folds = select.trains_policy, select.uses_fold_teachers

    def training(beside: int, *, rounds: bool) -> float:
        helpers = _data_workers(params, machine, beside, rounds=rounds)
        kept = sum(
            min(max(1, helpers) * images, room // beside) for images, _, room in _streams(params, counts, rounds=rounds)
        )
        batches = helpers * DATA_BATCHES * params.train.batch_size * _sample_bytes(params)
        return beside * (network + needs.train + kept * image_bytes + batches)

    def predict_bytes(sentences: int, images: int, sam: int = 0) -> float:
        """Of the stage's process, and of its workers, which hold the images of a chunk, and no tables."""
        from l2l_core.model.batch_predictor import chunk_rows  # not at the top: it loads PyTorch

        def computing(images: int) -> float:
            return (sizes.model or 0) + needs.predict + sam + min(images * image_bytes, IMAGE_CACHE_BYTES)

        worker = needs.network_start + computing(min(images, chunk_rows(params.evaluate.batch_size)))
        beside = 0 if machine is None else _beside(params, _busy(params, sentences))
        return needs.network_start + tables + computing(images) + beside * worker

    match kind:
        case "query" if params.priors.backend not in ("simulated", "replay", "none"):
            return None, None
        case "ingest" | "split" | "query" | "priors":
            return needs.start + needs.read, None
        case "proposals":
            cells = counts.sentences * params.priors.samples * params.proposals.size_px**2
            by_sam = params.proposals.renderer == "sam"
            each = RENDERED_BYTES * min(cells, CHUNK_CELLS) + (needs.sam if by_sam else 0)
            each += needs.network_start if by_sam else needs.start
            beside = 0 if machine is None else _beside(params, params.cluster.workers)
            return tables + (1 + beside) * each, needs.sam_gpu if by_sam else None
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
        case "select":  # the states of the chunks, all of them in one array, and two copies of the labels
            from l2l_core.pseudo_labels.reinforce import UNLABELED_SENTENCES  # not at the top: it loads PyTorch

            # A chunk usually has fewer sentences than the sample that the policy trains on.
            held = min(counts.unlabeled, UNLABELED_SENTENCES) + (counts.labeled if learns else 0)
            weights = params.proposals.size_px**2 if select.method == "semires" else 0
            states = 2 * needs.state * held + 2 * counts.unlabeled * (2 * sizes.mask + ROW_BYTES + weights)
            sam, sam_gpu = (needs.sam, needs.sam_gpu or 0) if select.uses_sam(params.proposals.model) else (0, 0)
            on_gpu = None if needs.predict_gpu is None else needs.predict_gpu + sam_gpu
            return predict_bytes(counts.unlabeled, counts.unlabeled_images, sam) + states, on_gpu
        case "predict" | "predict-distilled":
            return predict_bytes(counts.evaluated, counts.evaluated_images), needs.predict_gpu
        case _:
            return None, None  # drawing, evaluating, reporting: not measured


def _beside(params: Params, workers: int) -> int:
    """Worker processes on this machine, beside the stage's. Those of a running Ray cluster may be elsewhere."""
    cluster = params.cluster
    is_alone = cluster.executor == "local" and workers == 1
    return 0 if is_alone or cluster.address is not None else workers


def _sample_bytes(params: Params) -> int:
    """Of a sample in a batch: three bytes of color and two numbers of 4 bytes per pixel, and the map."""
    return 11 * params.model.image_size_px**2 + 4 * params.proposals.size_px**2


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
