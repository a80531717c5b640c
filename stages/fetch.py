"""Stage `fetch@<name>`: download a published data set, or the photos of all of them, to data/<name>."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from l2l_core.config import load_params
from l2l_core.data.fetch import fetch
from l2l_core.data.published import ARCHIVES
from l2l_core.errors import exit_code


def main() -> None:
    """What is there already is checked and stays; a broken download goes on where it ended."""
    params = load_params()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ARCHIVES)
    archive = ARCHIVES[parser.parse_args().name]
    # As checkpoints: outside the outputs, and in the main repository also where DVC works in a copy of it.
    scratch = Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / "fetch"
    done = fetch(
        archive, Path("data") / archive.name, scratch, params.fetch.mirror, params.fetch.sha256.get(archive.name)
    )
    print(f"fetch: {done}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
