"""Check before a run everything that could fail hours later; the stage `check` only checks `round`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import SCMError

from l2l_core.config import ONE_PROCESS, Params
from l2l_core.core.device import choose_device
from l2l_core.core.memory import available_bytes
from l2l_core.core.threads import thread_count, usable_cores
from l2l_core.errors import InputError, L2LError, raise_all
from l2l_core.model.segmenter import Segmenter
from l2l_core.preflight import backends, inputs
from l2l_core.preflight.doctor import refuse_torn_dvc_files
from l2l_core.preflight.estimate import Costs, Machine, Sizes, Stage, checkpoint_bytes, plan
from l2l_core.preflight.measure import TRAINING_STEPS, measure, take_sample
from l2l_core.preflight.memory import free_gpu_bytes
from l2l_core.training.side_by_side import plan_parallel

PrintLine = Callable[[str], None]
PIPELINE_FILE = "dvc.yaml"
TRAINING_REMEDY = "train.engine.micro_batch_size (or set train.engine.gradient_checkpointing)"
REMEDIES = dict.fromkeys(("warmup", "crossfit-0", "crossfit", "retrain", "distill"), TRAINING_REMEDY) | {
    "proposals": "proposals.size_px",
    "select": "evaluate.batch_size or select.grid",
    "predict": "evaluate.batch_size",
    "predict-distilled": "evaluate.batch_size",
}
"""Parameters to lower if memory is short."""


def run_checks(params: Params, *, timing: bool, print_line: PrintLine) -> None:
    """Check data, label budget, priors, encoders, device and disk, and estimate every stage's time, size and memory.

    timing: measure times and memory with a few training steps and predictions. print_line: receives each line at once.
    Writes only temporary files and downloads nothing. Raises InputError that lists all problems at once.
    """
    problems: list[str] = []
    available = available_bytes()  # before loading anything that the run's stages do not load
    with _collected(problems):
        check_repository()
    with tempfile.TemporaryDirectory() as scratch:
        data, split = _look_at_data(params, Path(scratch), print_line, problems)
        with _collected(problems):
            print_line(f"priors      {backends.describe_priors(params, data)}")
        with _collected(problems):
            print_line(f"proposals   {backends.describe_proposals(params)}")
        with _collected(problems):
            print_line(f"device      {backends.describe_device(params)}")
        if params.cluster != ONE_PROCESS:
            with _collected(problems):
                print_line(f"workers     {backends.describe_cluster(params)}")
        network = costs = needs = None
        with _collected(problems):
            print_line(f"encoders    {backends.describe_encoders(params.model)}")
            if advice := backends.advise_encoders(params):
                print_line(f"advice      {advice}")
            model = backends.local_model(params.model)
            if model is not None and data is not None:
                network = Segmenter.create(model, data.index.refs["sentence"].to_pylist(), params.seed)
        if data is not None and split is not None and not problems:
            with _collected(problems):
                sizes, device = _sizes(data, network), choose_device(params.train.engine.device)
                if timing and network is None:
                    print_line("times       not measured: an encoder is not on this machine")
                elif timing and network is not None:
                    sample = take_sample(params, data.paths, inputs.sample_sentences(params, data, split))
                    folder = backends.local_sam(params)
                    costs, needs = measure(params, network, sample, data.read_s, data.read_bytes, folder)
                stages = plan(
                    params,
                    inputs.count_roles(data, split),
                    costs,
                    sizes,
                    draws_refshapes=params.uses_builtin_dataset,
                    needs=needs,
                    at_once=plan_parallel(params, params.select.folds, data.index.images.num_rows).at_once,
                    machine=Machine(
                        usable_cores(),
                        thread_count(),
                        has_gpu=device.type == "cuda",
                        sam_has_gpu=params.proposals.renderer == "sam"
                        and choose_device(params.priors.engine.device).type == "cuda",
                    ),
                )
                _say_plan(stages, costs, print_line)
                if needs is not None:
                    _say_memory(stages, available, free_gpu_bytes(device), print_line)
                print_line(_disk(stages, sizes))
    raise_all(problems, InputError)


def check_repository() -> None:
    """Raise InputError if DVC cannot run the project in the current folder."""
    if not Path(PIPELINE_FILE).is_file():  # a folder with only data and params.yaml can be checked as well
        return
    try:
        with Repo() as repo:
            repo.scm  # noqa: B018  looks for the Git repository
            refuse_torn_dvc_files(repo)
    except (DvcException, SCMError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{Path.cwd()}: DVC cannot run here: {reason}; run git init here (where .dvc is missing, dvc init --subdir "
            "too), or, to work without Git, dvc config --local core.no_scm true"
        ) from None


def _look_at_data(
    params: Params, scratch: Path, print_line: PrintLine, problems: list[str]
) -> tuple[inputs.Data | None, pa.Table | None]:
    data = split = None
    with _collected(problems):
        data = inputs.read_data(params, scratch)
        print_line(f"data        {inputs.describe_data(params, data)}")
        for warning in data.index.warnings:
            print_line(f"warning     {warning}")
        inputs.check_masks(params, data)
        print_line(f"images      {inputs.describe_sizes(params, data)}")
        split = inputs.draw_split(params, data)
        print_line(f"labels      {inputs.describe_split(data, split)}")
    if data is not None and split is not None:
        with _collected(problems):
            inputs.check_rounds(params, data, split)
        with _collected(problems):
            inputs.check_evaluation(params, data, split)
    return data, split


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Append each error of the block to the problems, one line each, and continue after the block."""
    try:
        yield
    except L2LError as error:
        first, *rest = str(error).splitlines()  # several problems follow a line that counts them
        problems += [line.strip() for line in rest] or [first]


def _sizes(data: inputs.Data, network: Segmenter | None) -> Sizes:
    tables = (data.paths.images, data.paths.refs, data.paths.objects, data.paths.masks)
    counts = data.index.masks["rle_counts"].to_pylist()
    return Sizes(
        index=round(sum(path.stat().st_size for path in tables) / data.share),
        mask=sum(map(len, counts)) / len(counts),
        model=None if network is None else sum(value.nbytes for value in network.state_dict().values()),
    )


def _say_plan(stages: Sequence[Stage], costs: Costs | None, print_line: PrintLine) -> None:
    knows_memory, on_gpu = (any(getattr(stage, name) for stage in stages) for name in ("ram_bytes", "gpu_bytes"))

    def say_row(name: str, time: str, size: str, ram: str, gpu: str) -> None:
        shown = [time, size, *([ram] if knows_memory else []), *([gpu] if on_gpu else [])]
        print_line((f"{name:18}" + "".join(f"{value:>10}" for value in shown)).rstrip())

    print_line("")
    say_row("stage", "time", "disk", "memory", "GPU")
    for stage in stages:
        sizes = map(_size, (stage.size_bytes, stage.ram_bytes, stage.gpu_bytes))
        say_row(stage.name, _duration(stage.seconds), *sizes)
    known = None if costs is None else sum(stage.seconds or 0 for stage in stages)
    say_row("together", _duration(known), _size(sum(stage.size_bytes or 0 for stage in stages)), "", "")
    unknown = [stage.name for stage in stages if stage.seconds is None]
    if unknown and known is not None:
        print_line(f"The time together leaves out {', '.join(unknown)}.")
    if costs is not None:
        steps = f"{TRAINING_STEPS} training steps of {costs.step_s:.2g} s"
        print_line(f"Estimated from {steps} and a batch of labels, on this machine as busy as it is now.")
    print_line("-: not known. Stages in DVC's cache take no time. Formulas: docs/check.md")


def _say_memory(stages: Sequence[Stage], available: int, gpu_available: int | None, print_line: PrintLine) -> None:
    """Print the stage that needs most memory, and a warning for each kind of stage that does not fit."""
    for word, name, free in (("memory", "ram_bytes", available), ("GPU memory", "gpu_bytes", gpu_available)):
        needed = {stage.name: getattr(stage, name) or 0 for stage in stages}
        largest = max(needed, key=needed.__getitem__)
        if free is None or not needed[largest]:
            continue
        where = "on the GPU" if name == "gpu_bytes" else "here"
        print_line(f"memory      about {_size(needed[largest])} ({largest}), {_size(free)} are available {where}")
        short: dict[str, list[str]] = {}
        for stage, bytes_ in needed.items():
            if bytes_ > free:
                short.setdefault(REMEDIES.get(stage.partition("@")[0], "the size of the dataset"), []).append(stage)
        for remedy, names in short.items():
            most = _size(max(needed[stage] for stage in names))
            print_line(
                f"warning     {', '.join(names)}: about {most} of {word}, {_size(free)} are available; lower {remedy}"
            )


def _disk(stages: Sequence[Stage], sizes: Sizes) -> str:
    """Disk space needed, in one line. Raises InputError if there is too little."""
    needed = sum(stage.size_bytes or 0 for stage in stages) + (checkpoint_bytes(sizes) or 0)
    free = shutil.disk_usage(".").free
    line = f"{_size(needed)} with checkpoints, {_size(free)} are free here"
    if needed > free:
        raise InputError(f"disk: a run needs about {line}; make room, or lower round, proposals.size_px or model")
    return f"disk        {line}"


def _duration(seconds: float | None) -> str:
    """Approximate: 8 s, 3.4 min, 2.1 h."""
    if seconds is None:
        return "-"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(size_bytes: float | None) -> str:
    """Approximate: 12 kB, 3.4 MB, 2.1 GB."""
    if size_bytes is None:
        return "-"
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= length:
            return f"{size_bytes / length:.1f} {unit}"
    return f"{size_bytes / 1e3:.0f} kB"
