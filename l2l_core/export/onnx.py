"""The network as an ONNX file."""

from __future__ import annotations

import copy
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from l2l_core.data.pairs import Batch
from l2l_core.errors import ConfigError
from l2l_core.model.segmenter import Segmenter

NEEDED = ("onnx", "onnxscript")
OPSET = 20
"""Covers every operation of the network; onnxruntime reads it since 1.17."""
IMAGE_INPUTS = ("image", "box", "has_box", "proposal", "proposal_score")


class _Plain(nn.Module):
    """The network with plain tensors in and one tensor out."""

    def __init__(self, network: Segmenter, token_names: list[str]) -> None:
        super().__init__()
        self.network = network
        self.token_names = token_names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors in the order of IMAGE_INPUTS and token_names -> mask logits [B, 1, S, S]."""
        image, box, has_box, proposal, score, *tokens = tensors
        batch = Batch(image, [], [], box, has_box, proposal, score)
        named = dict(zip(self.token_names, tokens, strict=True))
        return self.network.predict_logits(self.network.encode_image(image), batch, named)


def onnx_inputs(batch: Batch, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch and its tokens by input name of the ONNX file."""
    return {name: getattr(batch, name) for name in IMAGE_INPUTS} | tokens


def write_onnx(network: Segmenter, path: Path) -> None:
    """Write the network to one file, for one pair at a time; the output `mask_logits` is foreground above 0.

    Inputs have the shapes and ranges of Batch and the tokenizer's (model folder, tokenizer/), padded to
    `max_text_tokens`. The file's metadata holds what else a caller needs: image_size_px, max_text_tokens,
    proposal_size_px, flat_prob. Raises ConfigError if onnx or onnxscript is not installed, ArtifactError if the
    network has no proposal settings.
    """
    if not all(find_spec(name) for name in NEEDED):
        raise ConfigError(f"export onnx: needs {' and '.join(NEEDED)}: pip install -e '.[export]'")
    proposals = network.known_proposals()
    network = copy.deepcopy(network).cpu()
    for encoder in (network.image_encoder, network.text_encoder):
        encoder.set_attn_implementation("eager")  # torch cannot decompose Swin's fused attention
    size, side = network.params.image_size_px, proposals.size_px
    batch = Batch(
        image=torch.zeros((1, 3, size, size), dtype=torch.uint8),
        sentence=["word"],
        prior_text=[""],
        box=torch.zeros(1, 4),
        has_box=torch.zeros(1, dtype=torch.bool),
        proposal=torch.full((1, 1, side, side), proposals.flat_prob),
        proposal_score=torch.zeros(1),
    )
    tokens = network.tokenize(batch)
    inputs = onnx_inputs(batch, tokens)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every operation that it leaves unchanged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter calls deprecated parts of torch
        try:
            program = torch.onnx.export(
                _Plain(network, list(tokens)).eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=["mask_logits"],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.startswith("<class")), str(error))
            raise ConfigError(f"export onnx: torch cannot write these encoders as ONNX: {reason[:300]}") from None
    assert program is not None  # only TorchScript's exporter, which is not used, returns None
    program.model.metadata_props.update(
        image_size_px=str(size),
        max_text_tokens=str(network.params.max_text_tokens),
        proposal_size_px=str(side),
        flat_prob=str(proposals.flat_prob),
    )
    program.save(path, external_data=False)
