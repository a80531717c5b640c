"""Fit how GrabCut uses the priors' boxes, on the masks of the labeled sentences."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.config import ProposalsParams
from l2l_core.core.masks import encode_rle, intersection_union_px, resize_prob
from l2l_core.core.metrics import iou_from_px
from l2l_core.core.seeding import evenly_picked
from l2l_core.core.threads import thread_count
from l2l_core.priors.proposals import read_photo
from l2l_core.priors.renderers import grabcut_input, render_box, render_grabcut
from l2l_core.priors.samples import to_samples

RINGS = (0.1, 0.0, 0.25, 0.5, 0.75, 1.0)
CORES = (0.2, 0.0, 0.1, 0.35)
"""Values tried; the first is the start of the search and the fallback if too few labeled sentences have a box.
Loose boxes need a wide ring and a small core, tight boxes a narrow ring."""
MIN_SENTENCES, MAX_SENTENCES = 10, 200
"""Limits on labeled sentences with a box: fewer give no fit; of more, an even selection is compared."""


@dataclass(frozen=True)
class Fit:
    """The rendering parameters that fit the labeled masks best."""

    params: ProposalsParams  # with numbers for `ring` and `core`
    sentences: int  # labeled sentences compared; 0: no fit
    box_miou: float  # percent, of the boxes' own maps cut at 0.5 with the true masks; 0 without a fit
    miou: float  # the same, of the maps that `params` renders


def unfitted(params: ProposalsParams) -> ProposalsParams:
    """The parameters with each `fit` value replaced by the start of its search."""
    starts = {"ring": RINGS[0], "core": CORES[0]}
    return params.model_copy(update={name: start for name, start in starts.items() if getattr(params, name) == "fit"})


def renderings_of_fit(params: ProposalsParams, labeled: int) -> int:
    """Maximum number of proposals that `fit_proposals` renders for `labeled` sentences."""
    values = [tried for name, tried in (("ring", RINGS), ("core", CORES)) if getattr(params, name) == "fit"]
    return min(MAX_SENTENCES, labeled) * (2 + sum(len(tried) - 1 for tried in values)) if values else 0


def fit_proposals(
    priors: pa.Table, refs: pd.DataFrame, images: pd.DataFrame, truth: Mapping[int, bytes], params: ProposalsParams
) -> Fit:
    """Choose `ring` and then `core`, if they are `fit` in `params`, by mean IoU with the labeled masks.

    priors, refs, images: as in `make_proposals`. truth: sent_id -> true mask of each labeled sentence, as run lengths.
    Only the first response to a sentence counts, and only if it is a box. If no cut beats the boxes themselves, the
    renderer becomes `box`.
    Raises InputError if an image cannot be read.
    """
    settled = unfitted(params)
    if not params.needs_fit:
        return Fit(settled, 0, 0.0, 0.0)
    samples = to_samples(priors, refs, images)
    is_labeled = np.isin(samples.sent_id, np.fromiter(truth, np.int64, len(truth)))
    rows = (samples.has_box[:, 0] & ~samples.has_mask[:, 0] & is_labeled).nonzero()[0]  # a mask is used as it is
    if len(rows) < MIN_SENTENCES:
        return Fit(settled, 0, 0.0, 0.0)
    compared = samples.take(rows[evenly_picked(len(rows), MAX_SENTENCES)])
    files = images["file_name"].tolist()
    photos = {row: grabcut_input(read_photo(files[row], "GrabCut")) for row in np.unique(compared.image_row).tolist()}

    masks = [truth[sent_id] for sent_id in compared.sent_id.tolist()]

    def cut(row: int, tried: ProposalsParams) -> bytes:
        height, width = compared.image_hw[row].tolist()
        photo, box = photos[int(compared.image_row[row])], compared.box_xyxy[row, 0]
        by_box = tried.renderer == "box"
        soft = render_box(box, (height, width), tried) if by_box else render_grabcut(photo, box, (height, width), tried)
        return encode_rle(resize_prob(soft, height, width) > 0.5)

    def miou(tried: ProposalsParams) -> float:
        with ThreadPoolExecutor(thread_count()) as pool:
            cuts = list(pool.map(cut, range(len(masks)), repeat(tried)))
        return 100 * float(iou_from_px(*intersection_union_px(cuts, masks, compared.image_hw).T).mean())

    best = miou(settled)
    for name, values in (("ring", RINGS), ("core", CORES)):
        if getattr(params, name) != "fit":
            continue
        for value in values[1:]:
            tried = settled.model_copy(update={name: value})
            if (score := miou(tried)) > best:
                settled, best = tried, score
    box_miou = miou(settled.model_copy(update={"renderer": "box"}))
    if box_miou >= best:
        settled, best = settled.model_copy(update={"renderer": "box"}), box_miou
    return Fit(settled, len(masks), box_miou, best)
