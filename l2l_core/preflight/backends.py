"""Requirements of a run besides its data: source of priors, pretrained encoders, device. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import requests as http
import torch
from transformers.utils import cached_file

from l2l_core.artifacts import records
from l2l_core.config import ModelParams, Params, PriorsParams
from l2l_core.core.device import choose_device, resolve_precision
from l2l_core.core.device import describe_device as describe
from l2l_core.core.threads import usable_cores
from l2l_core.datasets.index import shorten
from l2l_core.errors import ConfigError, InputError, redacted
from l2l_core.mllm.coords import resolve_coord_space
from l2l_core.mllm.engine_openai import KEY_VARIABLE, api_key
from l2l_core.mllm.interpreter import has_package
from l2l_core.mllm.query import make_backend, make_questions, queries_on_ray, query_table
from l2l_core.mllm.replay import ReplayBackend, load_recorded
from l2l_core.model.encoders import ENCODER_FOLDERS, TINY
from l2l_core.model.packaged import PACKAGED, packaged_file
from l2l_core.model.sam import WEIGHTS, check_sam
from l2l_core.preflight.inputs import Data
from l2l_core.priors.table import interpret, kinds_of_sentences
from l2l_core.workers.chunks import check_gpus, worker_threads
from l2l_core.workers.on_ray import require_ray

SERVER_TIMEOUT_S = 5.0
"""A running server lists its models at once."""
REMEDIES = {
    "transformers": "pip install -e '.[mllm]'",
    "vllm": "set priors.engine.python to the Python of an environment that has it (docs/priors.md)",
}


def describe_device(params: Params) -> str:
    """The training device, in one line. Raises ConfigError if torch does not see the requested device."""
    device = choose_device(params.train.engine.device)
    precision = resolve_precision(params.train.precision, device)
    return f"{describe(device, precision)} (train.precision: {params.train.precision})"


def describe_cluster(params: Params) -> str:
    """Where chunks are computed, in one line. Raises ConfigError if Ray or the workers' GPUs are missing."""
    cluster, threads = params.cluster, worker_threads(params.cluster)
    if cluster.executor == "ray":
        require_ray()
        if queries_on_ray(params.priors, cluster) and not has_package(params.priors.engine.python, "ray"):
            raise ConfigError(
                f"params.yaml: priors.engine.python: {params.priors.engine.python!r} has no Ray, which query needs "
                "because cluster.executor is ray: install the cluster's version there, or set "
                "priors.engine.data_parallel to auto"
            )
    check_gpus(cluster, choose_device(params.train.engine.device).type)
    line = f"{cluster.workers} ({cluster.executor}), {threads} threads each"
    wanted, cores = cluster.workers * threads, usable_cores()
    if cluster.executor == "local" and cluster.workers > 1 and wanted > cores:
        return f"{line}, more than the {cores} cores: set cluster.cpus_per_worker (docs/scale.md)"
    return line


def describe_encoders(model: ModelParams) -> str:
    """The source of the encoders, in one line. Raises ConfigError for an impossible name."""
    return ", ".join(f"{key}: {_where(f'model.{key}', getattr(model, key))}" for key in ENCODER_FOLDERS)


def advise_encoders(params: Params) -> str | None:
    """One line of advice if the backbone is tiny and the data are the user's; None otherwise."""
    if params.model.image_encoder != TINY or params.uses_builtin_dataset:
        return None
    return (
        "model.image_encoder: tiny starts from random weights, which suits drawings; for photographs use pretrained "
        "ones: make small, then -S model.preset=small (docs/full_size.md)"
    )


def local_model(model: ModelParams) -> ModelParams | None:
    """The same network with its encoders named by their local folders; None if one is not on this machine."""
    folders = {key: _local_folder(f"model.{key}", getattr(model, key)) for key in ENCODER_FOLDERS}
    if None in folders.values():
        return None
    return model.model_copy(update={key: str(folder) for key, folder in folders.items()})


def describe_priors(params: Params, data: Data | None) -> str:
    """Whether the priors are available, in one line; data: None if the dataset cannot be read.

    Raises InputError or ConfigError if they are not.
    """
    priors = params.priors
    has_package(priors.engine.python, "torch")  # raises if the interpreter that runs `query` does not exist
    match priors.backend:
        case "openai" | "transformers" | "vllm":
            resolve_coord_space(str(priors.model), priors.coord_space)
            if priors.backend == "openai":
                return f"openai: {_query_server(priors)}"
            _check_packages(priors)
            return f"{priors.backend}: {_where('priors.model', str(priors.model))}; {_priors_device(priors)}"
        case "detector":
            _check_detector(priors)
            return f"detector: {_where('priors.model', str(priors.model))}; {_priors_device(priors)}"
        case "none":
            return "none: nothing is queried, every sentence takes the path without prior"
        case "simulated" | "replay":
            if data is None:
                return f"{priors.backend}: not looked at, since the dataset cannot be read"
            if priors.backend == "simulated":
                make_backend(priors, data.paths)
                return f"simulated: {priors.preset}'s errors on the true boxes"
            if data.is_sample:
                return f"replay: {priors.replay_file} is not looked at before the dataset is drawn"
            return f"replay: {priors.replay_file} has {_describe_recorded(priors, data)}"


def _describe_recorded(priors: PriorsParams, data: Data) -> str:
    """How many sentences have recorded responses, and of which kind they are, as the stages read them."""
    refs, images = (records.to_frame(table) for table in (data.index.refs, data.index.images))
    responses = load_recorded(str(priors.replay_file), refs, images, priors.coord_space)
    read = interpret(query_table(ReplayBackend(responses), make_questions(data.paths, priors.samples)))
    kinds = ", ".join(f"{count} {kind}" for kind, count in kinds_of_sentences(read).items())
    known = len({sent_id for sent_id, _ in responses})
    unused = sum(sample_index >= priors.samples for _, sample_index in responses)
    note = f"; {unused} with a sample_index from {priors.samples} on are not read (priors.samples)" if unused else ""
    return f"responses for {known} of {len(refs)} sentences: {kinds}{note}"


def describe_proposals(params: Params) -> str:
    """The renderer, and SAM's model if the run uses one, in one line. Raises ConfigError if the model is unusable."""
    proposals, renderer = params.proposals, params.proposals.renderer
    if not _uses_sam(params):
        return renderer
    where = _where("proposals.model", str(proposals.model))
    folder = local_sam(params)
    kind = f", {check_sam(folder)}" if folder is not None else ""
    device = sam_device(params)
    precision = resolve_precision("auto", device)
    return f"{renderer}; SAM: {where}{kind}; {describe(device, precision)}"


def sam_device(params: Params) -> torch.device:
    """Where SAM computes: the renderer on the MLLM's device, the selection on the training's."""
    if params.proposals.renderer == "sam":
        return choose_device(params.priors.engine.device, "params.yaml: priors.engine.device")
    return choose_device(params.train.engine.device, "params.yaml: train.engine.device")


def local_sam(params: Params) -> str | None:
    """Folder of SAM's model; None if the run uses none, or it is not on this machine. Raises ConfigError."""
    if not _uses_sam(params):
        return None
    folder = _local_folder("proposals.model", str(params.proposals.model))
    return None if folder is None else str(folder)


def _uses_sam(params: Params) -> bool:
    return params.proposals.renderer == "sam" or (params.round > 0 and params.select.uses_sam(params.proposals.model))


def _query_server(priors: PriorsParams) -> str:
    """Raises InputError if no server responds, ConfigError if it is not compatible or lacks the model."""
    url = f"{priors.engine.server_url.rstrip('/')}/models"
    key = api_key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = http.get(url, headers=headers, timeout=SERVER_TIMEOUT_S)
    except http.RequestException as error:
        raise InputError(
            f"{url}: no response ({type(error).__name__}); start a server or set priors.engine.server_url"
        ) from None
    if response.status_code != 200:
        raise ConfigError(f"{url}: HTTP {response.status_code}; check priors.engine.server_url and {KEY_VARIABLE}")
    try:
        names = [str(row["id"]) for row in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{url}: no list of models, expected an OpenAI-compatible server; check priors.engine.server_url"
        ) from None
    if priors.model not in names:
        there = shorten(names) or "none"
        raise ConfigError(f"params.yaml: priors.model: got {priors.model!r}, but the models at {url} are: {there}")
    return f"{redacted(url)} has {priors.model}"


def _check_packages(priors: PriorsParams) -> None:
    needs_grammar = priors.backend == "transformers" and priors.is_structured
    for package in (priors.backend, *(("xgrammar",) if needs_grammar else ())):
        if not has_package(priors.engine.python, package):
            raise ConfigError(
                f"params.yaml: priors.backend: got {priors.backend!r}, which needs {package}: "
                f"{REMEDIES[priors.backend]}"
            )


def _check_detector(priors: PriorsParams) -> None:
    """Raises ConfigError if the model is on this machine but is not a complete detector, or if a package is missing."""
    from l2l_core.mllm.engine_detector import find_family, load_processor  # loads much that other backends do not need

    folder = _local_folder("priors.model", str(priors.model))
    if folder is None:
        return
    if priors.engine.python is None:
        load_processor(str(folder))
    else:  # the other environment has its own packages
        find_family(str(folder))
    if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        raise ConfigError(f"params.yaml: priors.model: got {priors.model!r}, a folder without {' or '.join(WEIGHTS)}")


def _priors_device(priors: PriorsParams) -> str:
    """Device and precision of the model. Raises ConfigError if torch does not see the configured device."""
    if priors.engine.python is not None:  # the other environment has its own torch
        return f"precision {priors.precision}, decided by {priors.engine.python}"
    name = "auto" if priors.backend == "vllm" else priors.engine.device  # vLLM chooses by itself
    device = choose_device(name, "params.yaml: priors.engine.device")
    precision = resolve_precision(priors.precision, device, "priors.precision")
    return f"{describe(device, precision)} (priors.precision: {priors.precision})"


def _where(key: str, name: str) -> str:
    folder = _local_folder(key, name)
    if folder is None:
        return f"{name} (hub id, not on this machine: fetched when it is first needed)"
    return name if str(folder) == name else f"{name} (hub id, on this machine)"


def _local_folder(key: str, name: str) -> Path | None:
    """Local folder of a model (of a built-in encoder: its name); None for a hub id whose files are not on this machine.

    Raises ConfigError for an impossible name or a package that is not installed.
    """
    if name in PACKAGED:
        packaged_file(name)
    if name in (TINY, *PACKAGED) or Path(name).is_dir():
        return Path(name)
    try:
        config = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:
        raise ConfigError(
            f"params.yaml: {key}: got {name!r}, which is no folder here and cannot be a hub id; check the path"
        ) from None
    folder = Path(config).parent if config else None
    return folder if folder and any(file for pattern in WEIGHTS for file in folder.glob(pattern)) else None
