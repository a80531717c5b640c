"""Loads artifacts of earlier stages as batches and targets, by role. Ground truth is read for labeled pairs only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.config import Params
from l2l_core.data.pairs import BatchMaker, Pairs, Targets, load_pairs, load_targets
from l2l_core.errors import ArtifactError


def sentences_of(role: str) -> NDArray[np.int64]:
    """[N] sent_ids with a role (labeled, unlabeled, eval), in the split's order."""
    split = records.to_frame(records.read_table(records.SPLIT_PATH, records.SPLIT))
    return np.asarray(split.loc[split["role"] == role, "sent_id"].to_numpy(np.int64))


def pairs_of(params: Params, role: str, *, with_priors: bool = True, only: NDArray[np.int64] | None = None) -> Pairs:
    """All pairs of a role; without priors every pair has the flat proposal.

    only: sent_ids of the role to load, in this order. Raises ArtifactError if one does not have the role.
    """
    sent_ids = sentences_of(role)
    if only is not None and not np.isin(only, sent_ids).all():
        raise ArtifactError(f"a table names a sent_id that is not {role}; run dvc repro")
    return load_pairs(
        records.INDEX,
        sent_ids if only is None else only,
        records.PRIORS_PATH if with_priors else None,
        records.PROPOSALS_PATH if with_priors else None,
        params.proposals.size_px,
        params.proposals.flat_prob,
    )


def batches_of(params: Params, pairs: Pairs) -> BatchMaker:
    """A batch maker for the pairs at the network's input size."""
    return BatchMaker(pairs, params.model.image_size_px, params.proposals.flat_prob)


def labeled_targets(pairs: Pairs) -> Targets:
    """Ground-truth masks of labeled pairs, from the split's own copy."""
    return load_targets(records.LABELED_MASKS_PATH, records.INDEX, pairs)


def corpus(pairs: list[Pairs]) -> list[str]:
    """All sentences and prior texts of the pairs: the vocabulary source of a tokenizer built from scratch."""
    return [text for some in pairs for texts in (some.sentence, some.prior_text) for text in texts]
