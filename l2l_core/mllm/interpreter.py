"""The Python that runs the queries: an engine's packages may need a separate environment (`priors.engine.python`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

from l2l_core.errors import ConfigError

EXPECTED = (
    "expected the Python of an environment that has requirements.txt and what priors.backend needs, such as "
    ".venv-vllm/bin/python (`make vllm-cpu` builds it)"
)


def reexec_with_python(python: str | None, module: str) -> None:
    """Replace this process by `python -m module`, with the same arguments and process id. Return if `python` is None or
    the Python of this environment.

    Raises ConfigError if the interpreter does not exist or cannot import the module.
    """
    if python is None:
        return
    path = _find(python)
    probe = _run(path, f"import sys, {module}; print(sys.prefix)")
    lines = (probe.stdout if probe.returncode == 0 else probe.stderr).strip().splitlines() or ["nothing said"]
    if probe.returncode:
        raise ConfigError(f"params.yaml: priors.engine.python: {python!r} cannot run {module}: {lines[-1]}; {EXPECTED}")
    if lines[-1] != sys.prefix:
        os.execv(path, [path, "-m", module, *sys.argv[1:]])


def has_package(python: str | None, package: str) -> bool:
    """Whether a package is installed there, without importing it. Raises ConfigError for a missing interpreter."""
    if python is None:
        return importlib.util.find_spec(package) is not None
    looked = _run(_find(python), f"import importlib.util as u; raise SystemExit(not u.find_spec({package!r}))")
    return looked.returncode == 0


def _find(python: str) -> str:
    # DVC's temporary copies of the project (`--temp`, the queue) have no environment: use the project's.
    path = shutil.which(python) or shutil.which(os.path.join(os.environ.get("DVC_ROOT", "."), python))
    if path is None:
        raise ConfigError(f"params.yaml: priors.engine.python: got {python!r}, which is not there; {EXPECTED}")
    return path


def _run(path: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([path, "-c", code], text=True, capture_output=True, check=False)
