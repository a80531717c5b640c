"""Shared code of the training stages: streams, a resumable run, the saved teacher and its curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.artifacts.curves import live_curve
from l2l_core.config import Params, TrainParams
from l2l_core.core.device import choose_device, print_device, resolve_precision
from l2l_core.core.files import atomic_dir, fingerprint, scratch_folder
from l2l_core.core.masks import decode_rle
from l2l_core.core.progress import is_first_process
from l2l_core.core.seeding import derive_seed
from l2l_core.data.evolve import fuse
from l2l_core.data.load import batches_of, corpus, labeled_targets, pairs_of
from l2l_core.data.pairs import Pairs, Targets
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.loop import train
from l2l_core.training.streams import OnlineStream, Stream

LABEL_INPUTS = (records.SPLIT_PATH, records.LABELED_MASKS_PATH, records.INDEX.refs, records.INDEX.images)
PRIOR_INPUTS = (records.PRIORS_PATH, records.PROPOSALS_PATH)

ONLINE_THRESHOLD = 0.7
"""Minimum confidence of a valid pixel under an online teacher: the fixed threshold of DAM-Net (2025)."""


def new_network(params: Params, run_name: str, *, with_priors: bool = True) -> Segmenter:
    """A network with random (or pretrained) weights and a tokenizer that knows the training sentences."""
    pairs = [pairs_of(params, role, with_priors=with_priors) for role in ("labeled", "unlabeled")]
    network = Segmenter.create(params.model, corpus(pairs), derive_seed(params.seed, run_name))
    network.takes_priors = with_priors
    return network


def round_streams(params: Params, pseudo_labels: Path, *, with_priors: bool = True) -> list[Stream | OnlineStream]:
    """Labeled pairs, and the latest round's accepted pseudo-labels, or with `mean_teacher` all unlabeled pairs.

    The labeled pairs alone if no pseudo-label is accepted. with_priors: whether the student sees priors.
    """
    share = params.retrain.labeled_share
    pseudo: Stream | OnlineStream | None
    if method_of(pseudo_labels) == "mean_teacher":
        pseudo = online_stream(params, 1 - share, hides_priors=not with_priors)
    else:
        pseudo = pseudo_stream(params, pseudo_labels, 1 - share, with_priors=with_priors)
    labeled = labeled_stream(params, 1.0 if pseudo is None else share, with_priors=with_priors)
    return [labeled] if pseudo is None else [labeled, pseudo]


def labeled_stream(params: Params, share: float, *, with_priors: bool = True) -> Stream:
    """All labeled pairs with their ground-truth masks."""
    pairs = pairs_of(params, "labeled", with_priors=with_priors)
    return Stream(batches_of(params, pairs), labeled_targets(pairs), share)


def pseudo_stream(params: Params, pseudo_labels: Path, share: float, *, with_priors: bool = True) -> Stream | None:
    """The latest round's accepted pseudo-labels with their valid pixels and pixel weights; None if none is accepted.

    With `retrain.evolve_proposals`, each proposal is fused with its pseudo-label.
    """
    flags = records.read_table(pseudo_labels, records.PSEUDO_LABELS, ["round", "accepted"])
    is_chosen = (pc.field("round") == pc.max(flags["round"])) & pc.field("accepted")
    count = len(flags.filter(is_chosen))
    if not count:
        return None
    wanted = ["round", "sent_id", "rle_counts", "keep_rle", "weight", "accept_prob", "accepted"]
    weight, parts = _PixelWeights(count, params.proposals.size_px), []
    for part in records.TableParts(pseudo_labels, records.PSEUDO_LABELS, wanted):
        chosen = part.filter(is_chosen)
        weight.add(chosen["weight"])
        parts.append(chosen.drop_columns("weight"))
    table = records.to_frame(pa.concat_tables(parts))
    pairs = pairs_of(params, "unlabeled", with_priors=with_priors, only=table["sent_id"].to_numpy(np.int64))
    evolved = params.retrain.evolve_proposals and with_priors
    if evolved:
        _fuse_proposals(pairs, table["rle_counts"].tolist(), table["accept_prob"].tolist())
    targets = Targets(table["rle_counts"].tolist(), table["keep_rle"].tolist(), weight.maps)
    return Stream(batches_of(params, pairs), targets, share, evolved=evolved)


class _PixelWeights:
    """Column `weight` of pseudo-labels as one array, filled part by part: the maps are most of the table."""

    def __init__(self, count: int, side: int) -> None:
        self.maps: NDArray[np.uint8] | None = None  # [count, side, side], 255 without a weight; None: no label has one
        self._shape, self._row = (count, side, side), 0

    def add(self, column: pa.ChunkedArray) -> None:
        for row, one in enumerate(column, start=self._row):
            if one.is_valid:
                if self.maps is None:
                    self.maps = np.full(self._shape, 255, np.uint8)
                self.maps[row] = np.frombuffer(one.as_buffer(), np.uint8).reshape(self._shape[1:])
        self._row += len(column)


def _fuse_proposals(pairs: Pairs, labels: Sequence[bytes], label_prob: Sequence[float]) -> None:
    """Fuse each pair's proposal with its pseudo-label, in place."""
    for row, (height, width) in enumerate(pairs.hw.tolist()):
        pairs.proposal[row] = fuse(pairs.proposal[row], decode_rle(labels[row], height, width), label_prob[row])


def online_stream(params: Params, share: float, *, hides_priors: bool = False) -> OnlineStream:
    """All unlabeled pairs, for pseudo-labels that the teacher computes from their priors during training."""
    pairs = pairs_of(params, "unlabeled")
    return OnlineStream(batches_of(params, pairs), ONLINE_THRESHOLD, share, hides_priors=hides_priors)


def with_prior_swap(params: Params, streams: Sequence[Stream | OnlineStream]) -> list[Stream | OnlineStream]:
    """The streams of a round's training, with `retrain.prior_swap`."""
    return [replace(stream, prior_swap=params.retrain.prior_swap) for stream in streams]


def method_of(pseudo_labels: Path) -> str | None:
    """The rule that selected a round's pseudo-labels; None if the table is empty."""
    methods = records.read_table(pseudo_labels, records.PSEUDO_LABELS, ["method"])["method"]
    return methods[0].as_py() if len(methods) else None


def part_of(stream: Stream, rows: NDArray[np.int64]) -> Stream:
    """The stream restricted to the pairs at `rows`."""
    pairs: Pairs = stream.batches.pairs.take(rows)
    return replace(stream, batches=replace(stream.batches, pairs=pairs), targets=stream.targets.take(rows))


def without_images(stream: Stream, image_row: NDArray[np.int64]) -> Stream | None:
    """The stream without the pairs of the given images; None if no pair remains."""
    rows = (~np.isin(stream.batches.pairs.image_row, image_row)).nonzero()[0]
    return part_of(stream, rows) if len(rows) else None


def training_settings(params: Params) -> str:
    """The parameters that determine a training's result, for fingerprints. Excludes `train.engine`."""
    # `auto` precision depends on the machine. The data of a fold teacher depends on the folds.
    precision = resolve_precision(params.train.precision, choose_device(params.train.engine.device))
    train = f"{_tracked(params.train)} {precision}"
    folds = f"{params.select.folds} {params.select.cross_label}"
    return f"{params.seed} {params.model!r} {train} {params.proposals.rendering!r} {folds}"


def _tracked(train: TrainParams) -> dict[str, object]:
    return train.model_dump(exclude={"engine"})


def run_training(
    params: Params,
    run_name: str,
    network: Segmenter,
    streams: Sequence[Stream | OnlineStream],
    steps: int,
    inputs: list[Path],
    model_out: Path,
    curves_out: Path | None,
) -> None:
    """Train and write the teacher (and its curve). Resumes a killed run with the same inputs."""
    device, proposals = choose_device(params.train.engine.device), records.read_rendering()
    print_device(device, resolve_precision(params.train.precision, device))
    settings = f"{training_settings(params)} {steps} {[(stream.share, stream.prior_swap) for stream in streams]}"
    settings += f" {[isinstance(stream, Stream) and stream.evolved for stream in streams]}"
    seed = derive_seed(params.seed, run_name)
    with scratch_folder(run_name, fingerprint(run_name, settings, inputs)) as scratch:
        checkpoint = scratch / "checkpoint.pt"
        start = partial(
            train, network, streams, steps, params.train, seed=seed, run_name=run_name, checkpoint=checkpoint
        )
        if curves_out is None or not is_first_process():
            trained = start()
        else:
            with live_curve(curves_out) as log:
                trained = start(log=log)
        if is_first_process():
            with atomic_dir(model_out) as folder:
                trained.teacher.save(folder, proposals)
