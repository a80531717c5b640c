"""The network (SESM): image, sentence, prior and proposal -> mask logits and a refined proposal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2l_core.config import ModelParams, ProposalsParams
from l2l_core.core.files import file_sha256
from l2l_core.data.pairs import Batch
from l2l_core.errors import DOCTOR, ArtifactError, ConfigError
from l2l_core.model.decoder import Decoder
from l2l_core.model.encoders import (
    TINY,
    blank_encoders,
    load_tokenizer,
    make_image_encoder,
    make_text_encoder,
    make_tokenizer,
    normalization,
    save_encoder_configs,
)
from l2l_core.model.guidance import Guidance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 3
"""Version of the model folder. It changes when stored weights would compute a different function. Early folders have no
version."""


@dataclass(frozen=True)
class Pyramid:
    """The encoding of B images, independent of sentences and priors."""

    levels: list[Tensor]  # [B, D, h, w] each, finest first
    guidance_features: Tensor  # [B, D, h, w] second coarsest level, projected; input of the guidance
    detail: Tensor  # [B, C, H, W] image detail at twice the finest level's size, for the borders

    def take(self, rows: Tensor) -> Pyramid:
        """The pyramid of the given images, rows [N] int64 on any device, in that order."""
        return Pyramid([level[rows] for level in self.levels], self.guidance_features[rows], self.detail[rows])

    @classmethod
    def cat(cls, parts: Sequence[Pyramid]) -> Pyramid:
        """Concatenate the images of several pyramids."""
        levels = [torch.cat(list(level)) for level in zip(*(part.levels for part in parts), strict=True)]
        guidance_features = torch.cat([part.guidance_features for part in parts])
        return cls(levels, guidance_features, torch.cat([part.detail for part in parts]))


@dataclass(frozen=True)
class Output:
    """Logits of one forward pass."""

    mask_logits: Tensor  # [B, 1, S, S] float32, at the size of the input image
    refined_logits: Tensor  # [B, 1, h, w] float32, the refined proposal on a coarse grid


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Context that selects attention kernels: plain matrix products on a CPU, where they are faster for small maps.

    Use it for the backward pass too: recomputed activations must come from the same kernels.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def has_intact_weights(folder: Path) -> bool:
    """Whether a model folder has the weights whose digest its config.json states; True if it states none."""
    try:
        stated = json.loads((folder / "config.json").read_bytes()).get("sha256")
    except FileNotFoundError:
        return True  # not a folder that `Segmenter.save` wrote
    except (OSError, ValueError, AttributeError):
        return False
    weights = folder / "model.safetensors"
    return stated is None or (weights.is_file() and file_sha256(weights) == stated)


class Segmenter(nn.Module):
    """Encoders, guidance and decoder, with the tokenizer that belongs to them.

    num_passes: number of decoder passes per pair at inference; see `predict_logits`. Training uses one.
    proposals: parameters of the proposals used in training. precision: precision used in training. Both are None before
    training. precision_setting: `train.precision` (auto before training). takes_priors: whether training showed it
    priors. distilled_from: SHA-256 of the weights of the model that it was distilled from, None for others. `save`
    stores all five, so that a model folder is self-contained.
    """

    memory_format = torch.channels_last  # faster on CPUs and GPUs; see bench/training.py
    num_passes = 1
    proposals: ProposalsParams | None = None
    precision: str | None = None
    precision_setting = "auto"
    takes_priors = True
    distilled_from: str | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        params: ModelParams,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: PreTrainedModel,
        text_encoder: PreTrainedModel,
    ) -> None:
        super().__init__()
        self.params = params
        self.tokenizer = tokenizer
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        channels = list(image_encoder.channels)
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, params.dim)
        self.pool_projection = nn.Conv2d(channels[-2], params.dim, 1)
        self.guidance = Guidance(params.dim, params.heads, params.guidance_tokens)
        self.decoder = Decoder(channels, params.dim, params.heads)
        for name, values in zip(("pixel_mean", "pixel_std"), normalization(image_encoder), strict=True):
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)

    @classmethod
    def create(cls, params: ModelParams, corpus: list[str], seed: int) -> Segmenter:
        """Create a network. Encoders are pretrained if named; `seed` initializes all other weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = make_tokenizer(params.text_encoder, corpus)
            image_encoder = make_image_encoder(params.image_encoder)
            text_encoder = make_text_encoder(params.text_encoder, len(tokenizer), params.max_text_tokens)
            return cls(params, tokenizer, image_encoder, text_encoder)

    @classmethod
    def load(cls, folder: str | Path) -> Segmenter:
        """Load a network from a folder written by `save`. Raises ArtifactError if files are missing or do not fit."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: not found, run the stage that writes it: dvc repro")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found, passes = config.pop("format", None), int(config.pop("passes", cls.num_passes))
            proposals, precision = config.pop("proposals", None), config.pop("precision", None)
            config.pop("sha256", None)
            precision_setting = config.pop("precision_setting", cls.precision_setting)
            takes_priors, distilled_from = config.pop("takes_priors", True), config.pop("distilled_from", None)
            if found != FORMAT:
                raise ValueError(f"config.json: format: got {found!r}, expected {FORMAT}; train it again")
            params = ModelParams.model_validate(config)
            network = cls(params, load_tokenizer(folder / "tokenizer"), *blank_encoders(folder))
            network.num_passes, network.precision, network.precision_setting = passes, precision, precision_setting
            network.takes_priors, network.distilled_from = takes_priors, distilled_from
            network.proposals = None if proposals is None else ProposalsParams.model_validate(proposals)
            network.load_state_dict(load_file(folder / "model.safetensors"))
            if not has_intact_weights(folder):
                raise ValueError(f"model.safetensors differs from its digest in config.json; {DOCTOR}")
        except MemoryError:
            raise
        except Exception as error:  # of a damaged configuration or tokenizer, the libraries raise many types
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ArtifactError(f"{folder}: no usable model: {reason}") from None
        return network

    def save(self, folder: str | Path, proposals: ProposalsParams | None = None) -> None:
        """Write model.safetensors, config.json, tokenizer/ and the encoders' configurations into a folder.

        proposals: the proposal parameters of training, if not yet set on the network.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        weights = folder / "model.safetensors"
        save_file(state, weights)
        config = {"format": FORMAT} | self.params.model_dump() | {"passes": self.num_passes}
        config |= {"precision": self.precision, "precision_setting": self.precision_setting}
        config |= {"takes_priors": self.takes_priors, "distilled_from": self.distilled_from}
        config |= {"sha256": file_sha256(weights)}
        if (known := proposals or self.proposals) is not None:
            config["proposals"] = known.model_dump()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        save_encoder_configs(folder, self.image_encoder, self.text_encoder)

    def known_proposals(self) -> ProposalsParams:
        """The proposal parameters of training. Raises ArtifactError if they are unknown."""
        if self.proposals is None:
            raise ArtifactError(
                "config.json of the model lacks `proposals`, which every training saves with its model; train again"
            )
        return self.proposals

    def tokenize(self, batch: Batch, padding: Literal["max_length", "longest"] = "max_length") -> dict[str, Tensor]:
        """Sentence and prior text as one pair of segments [B, L] int64.

        `max_length` pads to `max_text_tokens`, so that a pair's result is bitwise independent of the other pairs'
        lengths. `longest` pads to the longest pair of the batch, which trains faster.
        """
        limit = self.params.max_text_tokens
        encoded = self.tokenizer(
            batch.sentence,
            batch.prior_text,
            padding=padding,
            truncation="longest_first",
            max_length=limit,
        )
        # Not `return_tensors`: it first flattens every list in Python.
        return {name: torch.tensor(rows) for name, rows in encoded.items()}

    def predict_logits(self, pyramid: Pyramid, batch: Batch, tokens: dict[str, Tensor]) -> Tensor:
        """Mask logits [B, 1, S, S] of the last pass. Each pass after the first takes the previous mask as its proposal.

        The proposal score stays that of the prior. pyramid: of the batch's images.
        """
        for _ in range(self.num_passes - 1):
            found = self.decode(pyramid, batch, tokens).mask_logits.sigmoid()
            proposal = F.interpolate(found, batch.proposal.shape[-2:], mode="area")
            batch = replace(batch, proposal=proposal)
        return self.decode(pyramid, batch, tokens).mask_logits

    def forward(self, batch: Batch, tokens: dict[str, Tensor]) -> Output:
        """Batch (see Batch for shapes) and its tokens, on the network's device -> logits."""
        return self.decode(self.encode_image(batch.image), batch, tokens)

    def encode_image(self, image: Tensor) -> Pyramid:
        """Images [B, 3, S, S] uint8 -> their pyramid, independent of sentences and priors."""
        with attention_kernels(image.device):
            scaled = (image.float() - self.pixel_mean) / self.pixel_std
            scaled = scaled.contiguous(memory_format=self.memory_format)
            features = list(self.image_encoder(scaled).feature_maps)
            detail = self.decoder.border.image_detail(scaled, features[0])
            return Pyramid(self.decoder.join(features), self.pool_projection(features[-2]), detail)

    def decode(self, pyramid: Pyramid, batch: Batch, tokens: dict[str, Tensor]) -> Output:
        """Pyramid of the batch's images, batch, tokens -> logits. `batch.image` supplies only the size and device."""
        with attention_kernels(batch.image.device):
            text = self.text_projection(self.text_encoder(**tokens).last_hidden_state)
            padding_mask = tokens["attention_mask"] == 0
            guidance = self.guidance(
                text,
                padding_mask,
                batch.box,
                batch.has_box,
                pyramid.guidance_features,
                batch.proposal,
                batch.proposal_score,
            )
            present = (~padding_mask)[:, :, None].to(text.dtype)
            conditioning = guidance.mean(1) + (text * present).sum(1) / present.sum(1)
            memory = torch.cat([guidance, text], dim=1)
            memory_padding_mask = F.pad(padding_mask, (guidance.shape[1], 0), value=False)
            mask_logits, refined_logits = self.decoder(
                pyramid.levels,
                pyramid.detail,
                conditioning,
                memory,
                memory_padding_mask,
                batch.proposal,
                batch.proposal_score,
            )
        size = batch.image.shape[-2:]
        mask_logits = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False)
        return Output(mask_logits, refined_logits.float())

    def enable_gradient_checkpointing(self) -> None:
        """Make the encoders recompute their activations in the backward pass instead of storing them.

        Raises ConfigError if an encoder does not support it.
        """
        for name, encoder in (("image_encoder", self.image_encoder), ("text_encoder", self.text_encoder)):
            try:
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
                encoder.config.use_cache = False  # cache of text generators; it needs the discarded activations
            except ValueError:
                raise ConfigError(
                    f"params.yaml: train.engine.gradient_checkpointing: got true, but model.{name} "
                    f"({type(encoder).__name__}) does not support it; use false or another encoder"
                ) from None

    def parameter_groups(self, lr: float, encoder_lr_scale: float, weight_decay: float) -> list[dict[str, object]]:
        """Parameter groups for AdamW: pretrained encoders use lr * encoder_lr_scale; norms and biases do not decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        pretrained = {
            "image_encoder.": self.params.image_encoder != TINY,
            "text_encoder.": self.params.text_encoder != TINY,
        }
        for name, parameter in self.named_parameters():
            scaled = any(slow and name.startswith(prefix) for prefix, slow in pretrained.items())
            key = (lr * encoder_lr_scale if scaled else lr, weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
        return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
