"""L2L: learn a referring expression segmentation model from few labeled and many unlabeled pairs.

    import l2l_core as l2l

    predictor = l2l.Predictor.from_pretrained("data/distilled/model")
    result = predictor("photo.jpg", "the dog on the left")  # .mask [H, W] bool, .prob [H, W] float32, .score

Public names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from l2l_core.core.threads import set_thread_policy

__version__ = "0.2.0"

set_thread_policy()  # here, since Python runs this file before any other of the package

if TYPE_CHECKING:
    from l2l_core.config import Params as Params
    from l2l_core.config import load_params as load_params
    from l2l_core.core.images import to_rgb as to_rgb
    from l2l_core.core.masks import decode_rle as decode_rle
    from l2l_core.core.masks import encode_rle as encode_rle
    from l2l_core.core.metrics import segmentation_scores as segmentation_scores
    from l2l_core.datasets.index import Index as Index
    from l2l_core.datasets.read import load_dataset as load_dataset
    from l2l_core.errors import ArtifactError as ArtifactError
    from l2l_core.errors import ConfigError as ConfigError
    from l2l_core.errors import InputError as InputError
    from l2l_core.errors import L2LError as L2LError
    from l2l_core.inference.predictor import Prediction as Prediction
    from l2l_core.inference.predictor import Predictor as Predictor
    from l2l_core.priors.parse import parse_response as parse_response
    from l2l_core.priors.renderers import render_box as render_box
    from l2l_core.priors.renderers import render_point as render_point

_HOMES = {
    "ArtifactError": "l2l_core.errors",
    "ConfigError": "l2l_core.errors",
    "Index": "l2l_core.datasets.index",
    "InputError": "l2l_core.errors",
    "L2LError": "l2l_core.errors",
    "Params": "l2l_core.config",
    "Prediction": "l2l_core.inference.predictor",
    "Predictor": "l2l_core.inference.predictor",
    "decode_rle": "l2l_core.core.masks",
    "encode_rle": "l2l_core.core.masks",
    "load_dataset": "l2l_core.datasets.read",
    "load_params": "l2l_core.config",
    "parse_response": "l2l_core.priors.parse",
    "render_box": "l2l_core.priors.renderers",
    "render_point": "l2l_core.priors.renderers",
    "segmentation_scores": "l2l_core.core.metrics",
    "to_rgb": "l2l_core.core.images",
}
"""Public names and their modules, which are imported when a name is first used: torch alone takes seconds."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
