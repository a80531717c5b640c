"""Streams of the toy pairs, and short trainings."""

from toy_pairs import TRAIN, toy_batches

from l2l_core.config import TrainParams
from l2l_core.data.pairs import Pairs, Targets
from l2l_core.training.streams import Stream


def streams_of(toy: tuple[Pairs, Targets], *shares: float) -> list[Stream]:
    return [Stream(toy_batches(toy[0]), toy[1], share) for share in shares or (1.0,)]


def with_(checkpoint_every: int = 2, **values: object) -> TrainParams:
    engine = TRAIN.engine.model_copy(update={"checkpoint_every": checkpoint_every})
    return TRAIN.model_copy(update={**values, "engine": engine})
