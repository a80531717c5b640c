"""Which stages a run has, and how long and how large each will be; the formulas are explained in docs/check.md."""

from __future__ import annotations

from dataclasses import dataclass

from l2l_core.config import Params

VIEWS = 3
"""Ways in which a teacher is asked about a sentence that it labels: with prior, mirrored, without prior."""
ANSWER_BYTES = 500
"""Of an answer, as it came and as it was read: the prompt's JSON is some 300 characters, and zstd shrinks it."""
ROW_BYTES = 50
"""Of a row of a table beside its masks: a dozen numbers."""
CHECKPOINT_MODELS = 4
"""A checkpoint holds student and teacher, and two moments of each weight."""


@dataclass(frozen=True)
class Counts:
    """Sentences of the data set, and of each role."""

    sentences: int
    labeled: int
    unlabeled: int
    evaluated: int


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on a sample."""

    start_s: float  # of a stage that does not use the network, until its work begins
    network_start_s: float  # of one that does
    read_s: float  # the whole data set
    proposal_s: float  # a sentence
    step_s: float  # of training
    ask_s: float  # a sentence, one way of asking, one pass
    label_s: float  # a sentence: its candidates and what a policy sees of them
    mask_s: float  # a mask at its image's size, as run lengths
    policy_step_s: float


@dataclass(frozen=True)
class Sizes:
    """Bytes, measured on a sample."""

    index: int  # all tables of ingest
    mask: float  # run lengths of one mask
    model: int | None  # the network's weights; None: its encoders are not on this machine


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str  # as DVC calls it
    seconds: float | None  # None: not known
    size_bytes: float | None  # of its outputs; None: not known


def stage_names(params: Params, *, draws_refshapes: bool) -> list[str]:
    """The stages that `dvc repro` runs from scratch, in an order in which it may run them."""
    names = ["check", *(["refshapes"] if draws_refshapes else []), "ingest", "split", "ask", "priors", "proposals"]
    names += ["warmup", "predict"]
    for number in range(1, params.round + 1):
        names += ["crossfit-0" if number == 1 else f"crossfit@{number - 1}"]
        names += [f"select@{number}", f"retrain@{number}", f"predict@{number}"]
    return [*names, "evaluate", "report"]


def plan(params: Params, counts: Counts, costs: Costs | None, sizes: Sizes, *, draws_refshapes: bool) -> list[Stage]:
    """Time and size of every stage; costs None: no times."""
    stages = []
    for name in stage_names(params, draws_refshapes=draws_refshapes):
        seconds = None if costs is None else _seconds(name, params, counts, costs)
        stages.append(Stage(name, seconds, _bytes(name, params, counts, sizes)))
    return stages


def checkpoint_bytes(sizes: Sizes) -> int | None:
    """Largest need of .scratch/ while a training runs: a checkpoint, and the next one while it is written."""
    return None if sizes.model is None else 2 * CHECKPOINT_MODELS * sizes.model


def _seconds(name: str, params: Params, counts: Counts, costs: Costs) -> float | None:
    kind, number = _parse(name)
    select, learns = params.select, params.select.policy == "reinforce"
    start, step_s = costs.network_start_s, costs.step_s
    passes = params.retrain.passes if number else 1
    match kind:
        case "check" | "split" | "priors":
            return costs.start_s
        case "ingest":
            return costs.start_s + costs.read_s
        case "ask":  # a model's speed is not measured here
            return costs.start_s if params.priors.backend in ("simulated", "replay", "none") else None
        case "proposals":
            return costs.start_s + counts.sentences * costs.proposal_s
        case "warmup":  # with priors and without
            return start + 2 * params.warmup.steps * step_s
        case "crossfit-0" if not learns:  # a fixed rule does not use the teachers
            return costs.start_s
        case "crossfit-0":
            return start + select.folds * select.fold_steps * step_s
        case "crossfit":
            if not learns or select.fold_update == "kept":
                return costs.start_s
            steps = select.fold_update_steps if select.fold_update == "further" else select.fold_steps
            return start + select.folds * steps * step_s
        case "select":
            passes = params.retrain.passes if number > 1 else 1  # of the teacher, the round before
            each = VIEWS * passes * costs.ask_s + costs.label_s + len(select.constructed) * costs.mask_s
            judged = counts.labeled if learns else 0
            policy_s = select.policy_steps * costs.policy_step_s if learns else 0.0
            return start + (counts.unlabeled + judged) * each + policy_s
        case "retrain":
            if select.policy == "mean_teacher":  # the teacher labels its share of every batch
                step_s += (1 - params.retrain.labeled_share) * params.train.batch_size * costs.ask_s
            return start + params.retrain.steps * step_s
        case "predict":
            ways = 2 if number else 3  # with and without prior; round 0 also the supervised model
            filled = -(-counts.evaluated // params.evaluate.batch_size) * params.evaluate.batch_size
            return start + ways * (filled * passes * costs.ask_s + counts.evaluated * costs.mask_s)
        case _:
            return None  # drawing, evaluating, reporting: not measured


def _bytes(name: str, params: Params, counts: Counts, sizes: Sizes) -> float | None:
    kind, number = _parse(name)
    labels = counts.unlabeled * (2 * sizes.mask + ROW_BYTES)
    match kind:
        case "ingest":
            return sizes.index
        case "split":
            return counts.labeled * (sizes.mask + ROW_BYTES)
        case "ask" | "priors":
            return counts.sentences * params.priors.samples * ANSWER_BYTES
        case "proposals":
            return counts.sentences * params.proposals.size_px**2
        case "warmup":
            return None if sizes.model is None else 2 * sizes.model
        case "retrain":
            return sizes.model
        case "crossfit-0" | "crossfit" if params.select.policy != "reinforce":
            return 0
        case "crossfit-0" | "crossfit":
            return None if sizes.model is None else params.select.folds * sizes.model
        case "select":
            return labels
        case "predict":  # what this and all earlier rounds predicted and selected
            return counts.evaluated * (3 + 2 * number) * (sizes.mask + ROW_BYTES) + number * labels
        case _:
            return None


def _parse(name: str) -> tuple[str, int]:
    """select@2 -> select, 2; warmup -> warmup, 0."""
    kind, _, number = name.partition("@")
    return kind, int(number or 0)
