"""params.yaml -> frozen, validated objects. Only this file defines the parameters and their allowed values."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from l2l_core.errors import ConfigError, raise_all, short_repr

BUILTIN_DATASET = "data/refshapes"
"""Written by the stage `refshapes`. Any other folder holds the user's data."""
LIVE_BACKENDS = ("transformers", "openai", "vllm", "detector")
"""Backends that run a model and accept any image. The others know only the sentences of the dataset."""
BUILTIN_MODEL = "refshapes-vlm"
"""Folder name of the built-in multimodal LLM, which is trained only on RefShapes."""

MAX_ROUND = 5
"""Number of rounds that stages/dvc.yaml defines. A larger `round` needs a longer `chain` there."""

RENAMED_KEYS = {
    **{
        f"train.{key}": f"train.engine.{key}"
        for key in ("device", "micro_batch_size", "gradient_checkpointing", "checkpoint_every")
    },
    "select.policy": "select.method",
    "retrain.passes": "retrain.num_passes",
}
"""Keys of earlier versions -> their current names."""
RENAMED_VALUES = {"select.fold_update": {"further": "continue", "fresh": "retrain", "kept": "freeze"}}
"""Key -> its values in earlier versions -> their current names."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "tiny": {
        "model": {
            "image_encoder": "tiny",
            "text_encoder": "tiny",
            "image_size_px": 96,
            "dim": 64,
            "heads": 4,
            "guidance_tokens": 8,
        },
        "train": {
            "batch_size": 16,
            "lr": 3e-3,  # for short runs; bench/benchmark.yaml trains longer, at 1e-3
            "encoder_lr_scale": 0.1,  # of no effect: tiny encoders use `lr`
            "weight_decay": 0.05,
            "warmup_fraction": 0.05,
            "lr_decay": "cosine",
            "ema_decay": 0.99,
        },
    },
    "small": {
        "model": {
            "image_encoder": "efficientnet-lite0",
            "text_encoder": "minilm",
            "image_size_px": 256,
            "dim": 64,
            "heads": 4,
            "guidance_tokens": 8,
        },
        "train": {
            "batch_size": 16,
            "lr": 2e-3,  # best of 1e-3, 2e-3, 3e-3 in runs of 60 steps without priors on photographs
            "encoder_lr_scale": 0.1,
            "weight_decay": 0.05,
            "warmup_fraction": 0.05,
            "lr_decay": "cosine",
            "ema_decay": 0.99,
        },
    },
    "full": {  # usual in the field: LAVT and its successors
        "model": {
            "image_encoder": "microsoft/swin-base-patch4-window12-384",
            "text_encoder": "bert-base-uncased",
            "image_size_px": 480,
            "dim": 256,
            "heads": 8,
            "guidance_tokens": 16,
        },
        "train": {
            "batch_size": 32,
            "lr": 5e-5,
            "encoder_lr_scale": 1.0,
            "weight_decay": 0.01,
            "warmup_fraction": 0.0,
            "lr_decay": "poly",
            "ema_decay": 0.9996,
        },
    },
}
"""`model.preset` -> section -> key -> value that `auto` stands for in that key."""

CoordScale = Literal["pixel", "resized_pixel", "norm1000", "norm999", "norm1024", "percent", "unit", "unit_square"]
"""pixel: of the original image; resized_pixel: of the image as the model saw it; norm*, percent and unit span the whole
image from 0 to their number; unit_square spans the image padded to a square."""
CoordSpace = Literal[
    CoordScale,
    "pixel_yx",
    "resized_pixel_yx",
    "norm1000_yx",
    "norm999_yx",
    "norm1024_yx",
    "percent_yx",
    "unit_yx",
    "unit_square_yx",
]
"""A scale, and whether y comes before x (`_yx`)."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublishedName = Literal["refcoco", "refcoco+", "refcocog", "images"]


PrecisionSetting = Literal["auto", "bf16", "fp32"]
"""auto: bf16 where the device computes it natively, else fp32 (core/device.py)."""
DeviceSetting = Literal["auto", "cpu", "cuda", "mps"]
"""auto: CUDA if a GPU is available, else the CPU."""
SAM_EXPECTED = "a hub id or folder of a model of the SAM family, such as facebook/sam2.1-hiera-tiny,"
Candidate = Literal["teacher", "ensemble", "sharpened", "prior", "overlap", "union", "neighbor", "sam"]
"""Ways to build a candidate mask: see pseudo_labels/candidates.py."""


class Section(BaseModel):
    """Base of every section. Unknown keys are errors, and values are frozen after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RefShapesParams(Section):
    """The built-in dataset (data/dvc.yaml)."""

    seed: Seed
    image_size_px: Annotated[int, Field(ge=64, le=512)]
    train_images: PositiveInt
    val_images: PositiveInt
    test_images: PositiveInt
    sentences_per_image: Annotated[int, Field(ge=1, le=4)]


class FetchParams(Section):
    """Published datasets (l2l fetch)."""

    mirror: str | None
    """Folder or URL that holds <name>.zip; tried before the published URLs."""
    sha256: dict[PublishedName, Sha256 | None]
    """Checksum of <name>.zip. Checked if set, since the publishers provide none."""


class IngestParams(Section):
    """Where to find the pairs of `dataset`."""

    images: str
    """`auto` (look inside and beside the dataset's folder) or a folder."""
    split_by: Annotated[str, Field(min_length=1)]
    """`auto` (the only file), or which refs(<split_by>) file to read if a folder holds several."""
    min_image_side_px: PositiveInt


class SplitParams(Section):
    """The label budget."""

    labeled_fraction: Annotated[float, Field(gt=0.0, le=1.0)]
    """Fraction of the training images. All sentences of these images are labeled."""
    list_file: str | None
    """JSON list of labeled images. null: draw `labeled_fraction` of the images."""


class PriorEngineParams(Section):
    """How the multimodal LLM runs. Nothing here changes the queries, so changes reuse cached responses."""

    python: str | None
    """Interpreter of the stage `query`, for a backend whose packages are in a separate environment."""
    device: DeviceSetting
    """Device of the `transformers` and `detector` backends."""
    batch_size: PositiveInt
    """Requests per batch of the `transformers` and `detector` backends."""
    chunk_size: PositiveInt
    """Requests stored at once. A kill loses at most this many, times data_parallel."""
    data_parallel: Literal["auto"] | PositiveInt
    """Processes of this machine, or actors on Ray, each with its own model and tensor_parallel GPUs. auto: on this
    machine, see `mllm.query.worker_count`."""
    tensor_parallel: PositiveInt
    """GPUs per model of the `vllm` backend."""
    memory_share: Annotated[float, Field(gt=0.0, le=1.0)]
    """Fraction of each GPU's memory (without GPUs: of system memory) for weights and cache of the `vllm` backend."""
    context_tokens: Annotated[int, Field(ge=256)]
    """Maximum tokens of a query and its response in the `vllm` backend, image included."""
    server_url: Annotated[str, Field(pattern=r"^https?://")]
    """URL for the `openai` backend, up to and including /v1."""
    concurrency: PositiveInt
    """Concurrent requests of the `openai` backend."""
    timeout_s: Annotated[float, Field(gt=0.0)]
    """Seconds without a response after which a request to the server fails."""
    server_retries: Annotated[int, Field(ge=0, le=20)]
    """Retries after a timeout, a lost connection or status 408, 429 or 5xx. The first is immediate; then the wait
    doubles from 2 s."""


class PricesParams(Section):
    """Price per million tokens, in any currency. null: the summary reports no cost."""

    prompt: Annotated[float, Field(ge=0.0)] | None
    completion: Annotated[float, Field(ge=0.0)] | None


class PriorsParams(Section):
    """What to query the multimodal LLM for, or a detector in its place."""

    backend: Literal["simulated", "replay", "transformers", "openai", "vllm", "detector", "none"]
    preset: Literal["qwen2.5-vl-7b", "internvl2.5-8b", "llava-1.5-7b"]
    """Error model of the `simulated` backend."""
    seed: Seed
    """Draws simulated responses, and additional samples and attempts of a model."""
    samples: Annotated[int, Field(ge=1, le=16)]
    """Responses per sentence; of `detector`: its best boxes."""
    replay_file: str | None
    """JSON lines with recorded responses or masks, for the `replay` backend."""
    coord_space: Literal["auto", CoordSpace]
    """How the model writes coordinates. `auto` looks up the model family."""
    check_coords: bool
    """Whether the stage `priors` stops if the labels show that coordinates have another meaning."""
    model: str | None
    """Hub id or folder (`transformers`, `vllm`, `detector`), or the model's name on the server (`openai`)."""
    prompt: Literal["box-1", "box-2", "point-1"]
    """Prompt template. `simulated` always responds in the format of box-1."""
    structured_output: Literal[True, False, "auto"]
    """Constrain the output to the prompt's JSON. `transformers` needs xgrammar, `openai` a server that supports it.
    auto: true for `vllm` and `openai`."""
    precision: PrecisionSetting
    """Precision of the `transformers`, `vllm` and `detector` backends."""
    max_image_px: Annotated[int, Field(ge=56 * 56)]
    """Area in pixels to which larger images are downscaled."""
    max_tokens: PositiveInt
    """Maximum tokens of a response. The n-th attempt may use n times as many."""
    retries: Annotated[int, Field(ge=0, le=10)]
    """Additional, sampled attempts after a response that violates the prompt's format."""
    temperature: Annotated[float, Field(gt=0.0, le=2.0)]
    """Sampling temperature. The first attempt at a sentence's first sample is greedy instead."""
    engine: PriorEngineParams
    prices: PricesParams

    @property
    def uses_builtin_mllm(self) -> bool:
        """Whether the backend queries the built-in multimodal LLM."""
        return self.backend in LIVE_BACKENDS and Path(str(self.model)).name == BUILTIN_MODEL

    @model_validator(mode="after")
    def _backends_have_what_they_need(self) -> PriorsParams:
        if self.backend == "replay" and not self.replay_file:
            raise ValueError("replay_file: got null, expected a JSON-lines file because backend is replay")
        if self.backend in LIVE_BACKENDS and not self.model:
            raise ValueError(f"model: got {self.model!r}, expected a model's name because backend is {self.backend}")
        if self.backend == "detector" and self.uses_builtin_mllm:
            raise ValueError(
                f"model: got {self.model!r}, which is no detector, expected one such as "
                "IDEA-Research/grounding-dino-tiny because backend is detector (docs/priors.md)"
            )
        return self

    @property
    def is_structured(self) -> bool:
        """`structured_output` with `auto` resolved."""
        return self.backend != "transformers" if self.structured_output == "auto" else self.structured_output


class ProposalsParams(Section):
    """How a prior becomes a soft map."""

    renderer: Literal["box", "grabcut", "sam"]
    model: str | None = None  # models of earlier versions do not store it
    """Of the renderer `sam`, the candidate `sam` and the method `semires`: hub id or folder of a model of the SAM
    family."""
    ring: Annotated[float, Field(ge=0.0, le=4.0)] | Literal["fit"]
    """Of `grabcut`: how far the object may extend beyond the box, as a fraction of the box sides. fit: the value that
    fits the labeled masks best."""
    core: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["fit"]
    """Of `grabcut`: side of the box center that is certainly object, as a fraction of the box sides; or fit."""
    size_px: Annotated[int, Field(ge=8, le=256)]
    """Side of the square map, which covers the whole image."""
    falloff: Annotated[float, Field(gt=0.0, le=1.0)]
    """Width of the soft border, as a fraction of the box side."""
    inside_prob: Annotated[float, Field(gt=0.5, le=1.0)]
    """Value inside a box. Outside it is 1 - inside_prob, so the map exceeds 0.5 exactly in the box."""
    flat_prob: Annotated[float, Field(ge=0.0, le=0.5)]
    """Value of the whole map if there is no prior. Foreground is above 0.5, so the map has none."""

    @property
    def needs_fit(self) -> bool:
        """Whether some values of the renderer must be fitted to the labeled masks."""
        return self.renderer == "grabcut" and "fit" in (self.ring, self.core)

    @property
    def unused(self) -> frozenset[str]:
        """Keys that the renderer does not read."""
        read = {"box": set(), "grabcut": {"ring", "core"}, "sam": {"model"}}[self.renderer]
        return frozenset({"ring", "core", "model"} - read)

    @property
    def rendering(self) -> ProposalsParams:
        """The parameters without `model`, unless the renderer reads it: a SAM for the selection changes no proposal."""
        return self if self.renderer == "sam" else self.model_copy(update={"model": None})

    @model_validator(mode="after")
    def _sam_has_a_model(self) -> ProposalsParams:
        if self.renderer == "sam" and not self.model:
            raise ValueError(f"model: got {self.model!r}, expected {SAM_EXPECTED} because renderer is sam")
        return self


class ModelParams(Section):
    """The network. In params.yaml, `auto` stands for the preset's value."""

    preset: Literal["tiny", "small", "full"] = "tiny"  # models of earlier versions do not store it
    """Which values of PRESETS `auto` stands for."""
    image_encoder: str
    """`tiny` (small and random), `efficientnet-lite0`, or a hub id or folder."""
    text_encoder: str
    """`tiny` (small and random), `minilm`, or a hub id or folder."""
    image_size_px: Annotated[int, Field(ge=32, le=2048)]
    dim: Annotated[int, Field(ge=8, le=1024)]
    heads: PositiveInt
    guidance_tokens: Annotated[int, Field(ge=1, le=64)]
    max_text_tokens: Annotated[int, Field(ge=4, le=512)]

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> ModelParams:
        if self.dim % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of dim ({self.dim})")
        return self


class TrainEngineParams(Section):
    """How training runs. Nothing here is tracked by DVC or part of a checkpoint's fingerprint.

    Results are equal up to the order of float sums. `micro_batch_size` also changes which samples share a dropout draw.
    """

    device: DeviceSetting
    micro_batch_size: PositiveInt | None
    """Samples that a process computes at once. null: its whole share."""
    gradient_checkpointing: bool
    """Recompute the encoders' activations instead of storing them: slower, but needs less memory."""
    side_by_side: bool
    """Run independent trainings as parallel processes if threads or GPUs, and memory, suffice."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    """Processes that compute the next batches while a training computes. auto: see `training.workers.worker_count`."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints. A killed stage resumes from the latest one."""


class TrainParams(Section):
    """Settings that warm-up and retraining share."""

    batch_size: PositiveInt
    """Samples per step, over all processes."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)]
    encoder_lr_scale: Annotated[float, Field(ge=0.0, le=1.0)]
    """Learning rate of pretrained encoders relative to `lr`. Tiny encoders always use `lr`."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    warmup_fraction: Fraction
    """Fraction of the steps in which the learning rate rises."""
    lr_decay: Literal["cosine", "poly"]
    """How the learning rate falls to 0 afterwards. poly has the exponent 0.9."""
    grad_clip: Annotated[float, Field(gt=0.0)]
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)]
    prior_dropout: Fraction
    """Fraction of the samples trained without their prior."""
    flip: bool
    """Mirror half of the training samples and swap left and right in their sentences."""
    precision: PrecisionSetting
    log_every: PositiveInt
    engine: TrainEngineParams


class WarmupParams(Section):
    """Supervised training on the labeled pairs (round 0)."""

    steps: PositiveInt


class SelectParams(Section):
    """How to select pseudo-labels and their valid pixels."""

    method: Literal[
        "reinforce", "all", "none", "threshold", "semires", "topk", "agreement", "ranksum", "mean_teacher", "oracle"
    ]
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    """Candidate masks of a sentence. `reinforce` and `oracle` choose one; other rules take the first."""
    folds: Annotated[int, Field(ge=2, le=10)]
    """Number of fold teachers. Their candidates are scored on labeled images that they never saw."""
    fold_steps: PositiveInt
    fold_update: Literal["continue", "retrain", "freeze"]
    """After a round, fold teachers continue on its pseudo-labels, are retrained with them, or stay frozen."""
    fold_update_steps: PositiveInt
    """Steps of `continue`. `retrain` uses fold_steps."""
    cross_label: bool
    """Label each unlabeled sentence with the fold teacher that never saw its image, instead of the round's model."""
    grid: Annotated[int, Field(ge=2, le=64)]
    """Cells per side of the grid. The pixels of a cell are kept or dropped together."""
    pixel_threshold: Annotated[float, Field(ge=0.5, lt=1.0)]
    """`threshold`: keep pixels whose confidence max(p, 1 - p) reaches this."""
    keep_fraction: Annotated[float, Field(gt=0.0, le=1.0)]
    """`topk`, `agreement`, `ranksum`: fraction of the sentences to keep."""
    update: Literal["reinforce", "grpo"]
    """Of the policy: REINFORCE with a leave-one-out baseline, or GRPO's clipped ratios and normalized advantages."""
    policy_steps: PositiveInt
    """Gradient steps of each actor, for either update."""
    group_size: Annotated[int, Field(ge=2)]
    """Actions drawn per sentence. Their rewards are compared with each other."""
    policy_lr: Annotated[float, Field(gt=0.0)]
    entropy_bonus: Annotated[float, Field(ge=0.0)]
    wrong_cost: Annotated[float, Field(ge=0.0)]
    """Cost of a wrong pixel, in units of the gain from a correct one."""
    unlabeled_weight: Annotated[float, Field(ge=0.0)]
    """Weight of the agreement reward on unlabeled sentences, before scaling by its measured reliability."""

    @field_validator("candidates")
    @classmethod
    def _no_candidate_twice(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"got {names}, expected each name once")
        return names

    @model_validator(mode="after")
    def _pixel_rules_weigh_the_teacher(self) -> SelectParams:
        if self.method in ("threshold", "semires") and self.candidates[0] != "teacher":
            raise ValueError(
                f"candidates: got {self.candidates}, expected teacher as the first because method is {self.method}: "
                "it weighs pixels by the teacher's confidence in its own mask"
            )
        return self

    @model_validator(mode="after")
    def _the_stage_creates_the_labels(self) -> SelectParams:
        if self.cross_label and self.method == "mean_teacher":
            raise ValueError(
                "cross_label: got true, expected false because method is mean_teacher: its labels come from the "
                "network that is being trained"
            )
        return self

    @property
    def candidate_names(self) -> list[str]:
        """The candidates that the method uses. A fixed rule uses only the first."""
        return list(self.candidates) if self.method in ("reinforce", "oracle") else list(self.candidates[:1])

    def uses_sam(self, model: str | None) -> bool:
        """Whether the selection runs SAM. model: `proposals.model`; `semires` matches SAM's masks if one is named."""
        return "sam" in self.candidate_names or (self.method == "semires" and bool(model))

    @property
    def trains_policy(self) -> bool:
        """Whether the method trains a policy, on the predictions of the fold teachers."""
        return self.method == "reinforce"

    @property
    def uses_fold_teachers(self) -> bool:
        """Whether the selection needs the fold teachers: to train the policy, or to label."""
        return self.trains_policy or self.cross_label


class RetrainParams(Section):
    """Training on labels and accepted pseudo-labels."""

    steps: PositiveInt
    labeled_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Fraction of each batch that comes from the labeled pairs."""
    prior_swap: Fraction
    """Fraction of the samples that get the box and proposal of another sentence (data/prior_swap.py)."""
    evolve_proposals: bool
    """Fuse the proposals of pseudo-labeled sentences with their pseudo-labels (data/evolve.py). Labeled sentences and
    inference keep the prior's proposal."""
    start: Literal["scratch", "teacher"]
    """Start from random weights or from the last round's model."""
    num_passes: Annotated[int, Field(ge=1, le=4)]
    """Forward passes per pair at inference. Each pass after the first takes the previous mask as its proposal."""


class DistillParams(Section):
    """Training of the student for use without priors."""

    steps: PositiveInt


class EvaluateParams(Section):
    """What to evaluate."""

    splits: Annotated[list[Literal["train", "val", "test", "testA", "testB"]], Field(min_length=1)]
    """Splits whose held-out sentences are scored. `train` has some if a list file names evaluation images."""
    batch_size: PositiveInt


class ClusterParams(Section):
    """Where chunks of `query`, `proposals`, `select` and `predict` are computed (docs/scale.md). Not tracked by DVC.

    Their bytes depend on `cpus_per_worker`, as on OMP_NUM_THREADS, but on nothing else here.
    """

    executor: Literal["local", "ray"]
    workers: PositiveInt
    """Processes (`local`; 1 computes in the stage's own process) or actors (`ray`), each with its own network. Those of
    `query` are `priors.engine.data_parallel`."""
    address: str | None
    """Of a running Ray cluster. null: `ray` starts one on this machine and stops it at the end."""
    cpus_per_worker: PositiveInt | None
    """Threads of each worker. null: those of the stage (OMP_NUM_THREADS, or all cores)."""
    gpus_per_worker: Annotated[int, Field(ge=0)]


ONE_PROCESS = ClusterParams(executor="local", workers=1, address=None, cpus_per_worker=None, gpus_per_worker=0)
"""Computes in the caller's own process."""


class ReportParams(Section):
    """The HTML report."""

    cases: Annotated[int, Field(ge=1, le=200)]
    """Overlays per kind of case."""


class Params(Section):
    """Everything in params.yaml."""

    seed: Seed
    round: Annotated[int, Field(ge=0, le=MAX_ROUND)]
    dataset: Annotated[str, Field(min_length=1)]
    refshapes: RefShapesParams
    fetch: FetchParams
    ingest: IngestParams
    split: SplitParams
    priors: PriorsParams
    proposals: ProposalsParams
    model: ModelParams
    train: TrainParams
    warmup: WarmupParams
    select: SelectParams
    retrain: RetrainParams
    distill: DistillParams
    evaluate: EvaluateParams
    report: ReportParams
    cluster: ClusterParams

    @property
    def uses_builtin_dataset(self) -> bool:
        """Whether the stage `refshapes` writes the dataset."""
        return Path(self.dataset) == Path(BUILTIN_DATASET)

    @model_validator(mode="after")
    def _candidate_has_a_model(self) -> Params:
        if "sam" in self.select.candidate_names and not self.proposals.model:
            raise ValueError(
                f"proposals.model: got {self.proposals.model!r}, expected {SAM_EXPECTED} because select.candidates "
                "names sam"
            )
        return self

    @model_validator(mode="after")
    def _evolving_needs_probabilities(self) -> Params:
        if self.retrain.evolve_proposals and self.select.method != "reinforce":
            raise ValueError(
                f"retrain.evolve_proposals: got true, expected false because select.method is {self.select.method}: "
                "only reinforce estimates the probability that a pseudo-label is right"
            )
        return self

    @model_validator(mode="after")
    def _model_knows_the_data(self) -> Params:
        if not self.priors.uses_builtin_mllm:
            return self
        for key, got, taught in (
            ("prompt", self.priors.prompt, ("box-2",)),
            ("coord_space", self.priors.coord_space, ("auto", "percent")),
        ):
            if got not in taught:
                raise ValueError(
                    f"priors.{key}: got {short_repr(got)}, expected {taught[-1]!r}, "
                    f"the one that {BUILTIN_MODEL} was taught"
                )
        if not self.uses_builtin_dataset:
            raise ValueError(
                f"priors.model: got {self.priors.model!r}, which knows {BUILTIN_DATASET} alone, but dataset is "
                f"{self.dataset!r}: name another model, replay recorded responses (priors.backend=replay), or do "
                "without (priors.backend=none)"
            )
        return self


class _Loader(yaml.SafeLoader):
    """Reads floats as in YAML 1.2: `1e-05`, which `dvc exp run -S` writes, is a number; in YAML 1.1 it is a string.

    Refuses aliases (`*name`): a few of them can stand for a document that is endless or larger than memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As in PyYAML. Raises ComposerError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "got an alias (*name), expected the value itself", self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As in PyYAML, which passes on whatever a value such as `2020-13-45` or `!!int x` raises: name its place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"got {short_repr(node.value)}, which is no {kind}"
            raise ConstructorError(None, None, problem, node.start_mark) from error


_TYPE_OF_SEVERAL = re.compile(r"constrained-\w+|literal\[.*\]")
"""Last part of a location in pydantic's errors if it names a type instead of a key."""

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_params(raw: object, source: str = "params.yaml") -> Params:
    """Validate a parsed YAML document.

    Raises one ConfigError that names every wrong key: `params.yaml: priors.backend: got 'vlm', expected ...`.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: got {type(raw).__name__}, expected a mapping of sections")
    try:
        return Params.model_validate(_resolved(raw))
    except ValidationError as error:
        raise_all([f"{source}: {problem}" for problem in _problems(error.errors())], ConfigError)
        raise  # unreachable: a ValidationError always carries at least one detail


def _resolved(raw: dict[str, Any]) -> dict[str, Any]:
    """The document with the preset's values in place of `auto`. An invalid preset is left to the validation."""
    model = raw.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    found = dict(raw)
    for section, values in PRESETS.get(name if isinstance(name, str) else "", PRESETS["tiny"]).items():
        if isinstance(keys := raw.get(section), dict):
            found[section] = {key: values.get(key, value) if value == "auto" else value for key, value in keys.items()}
    return found


def load_params(path: str | Path = "params.yaml", overrides: Sequence[str] = ()) -> Params:
    """Read and validate a params file.

    overrides: changes in the syntax of `dvc exp run -S`; the file itself does not change. Raises ConfigError if the
    file is missing, not YAML or invalid, or if an override has an unknown key or an invalid value.

    >>> load_params("params.yaml", overrides=["round=1", "train.lr=1e-4"]).train.lr
    0.0001
    """
    path = Path(path)
    if overrides:
        return _overridden(path, [overrides] if isinstance(overrides, str) else overrides)
    return parse_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> object:
    """A YAML document with floats as in YAML 1.2. Raises ConfigError if the file is missing or not valid YAML."""
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise ConfigError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}, expected a YAML file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found, run from the project's root") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML that can be read: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _overridden(path: Path, overrides: Sequence[str]) -> Params:
    """Let DVC apply the changes to a copy, so that overrides work exactly as with `dvc exp run`."""
    from dvc.exceptions import InvalidArgumentError  # takes a second to import
    from dvc.utils.hydra import apply_overrides
    from omegaconf.errors import OmegaConfBaseException  # of interpolations, such as ${seed}

    params = load_params(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, folder)
        try:
            apply_overrides(copy, list(overrides))
            return load_params(copy)
        except (InvalidArgumentError, OmegaConfBaseException) as error:
            _refuse_unknown_keys(path, overrides, params)
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(f"-S {' -S '.join(overrides)}: {reason}; expected key=value of {path}") from None
        except ConfigError as error:
            raise ConfigError(str(error).replace(copy, str(path))) from None


def _refuse_unknown_keys(path: Path, overrides: Sequence[str], params: Params) -> None:
    """Raise ConfigError for the first key that the file lacks, and suggest the most similar key."""
    known = list(_dotted(params.model_dump()))
    for override in overrides:
        key = override.partition("=")[0]
        if key and not key.startswith(("+", "~")) and key not in known:  # Hydra's signs: add, delete
            alike = get_close_matches(key, known, 1)
            hint = f"; did you mean {alike[0]}?" if alike else ""
            raise ConfigError(f"-S {override}: {path} has no {key}{hint}")


def _dotted(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All keys of nested sections, including the sections: priors, priors.engine, priors.engine.device, ..."""
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")


def _problems(details: Iterable[Any]) -> Iterator[str]:
    """One line per key. If a key accepts several types, pydantic reports each type separately."""
    by_key: dict[tuple[object, ...], list[str]] = {}
    for detail in details:
        *place, last = detail["loc"] or ("",)
        key = tuple(place) if _TYPE_OF_SEVERAL.fullmatch(str(last)) else detail["loc"]
        by_key.setdefault(key, []).append(_explain(dict(detail) | {"loc": key}))
    for first, *others in by_key.values():
        yield " or ".join([first, *(other.partition("expected ")[2] for other in others)])


def _explain(detail: Any) -> str:
    """One pydantic problem as `key: got VALUE, expected WHAT`."""
    key = ".".join(str(part) for part in detail["loc"])
    kind, got = detail["type"], detail.get("input")
    context = detail.get("ctx", {})
    match kind:
        case "missing":
            return f"{key}: missing, add it (see the comments in params.yaml)"
        case "extra_forbidden" if key in RENAMED_KEYS:
            return f"{key}: renamed, use {RENAMED_KEYS[key]} (see params.yaml)"
        case "extra_forbidden":
            return f"{key}: unknown parameter, expected one of those in params.yaml; check the spelling"
        case "literal_error" if isinstance(got, str) and got in RENAMED_VALUES.get(key, {}):
            return f"{key}: {short_repr(got)} was renamed, use {RENAMED_VALUES[key][got]!r}"
        case "literal_error":
            expected = context["expected"].replace(" or ", ", ")
            return f"{key}: got {short_repr(got)}, expected {'one of ' * (', ' in expected)}{expected}"
        case "model_type":
            return f"{key}: got {short_repr(got)}, expected a section with its own keys"
        case "value_error":
            return f"{key}.{context['error']}" if key else str(context["error"])
        case _:
            message = detail["msg"].removeprefix("Input should be ").removeprefix("String should have ")
            return f"{key}: got {short_repr(got)}, expected {message}"
