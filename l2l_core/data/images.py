"""Image files of a data set: found to be whole, measured and fingerprinted."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from l2l_core.progress import progress
from l2l_core.threads import thread_count

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What the pipeline decodes later; any other format is refused here."""

EXIF_ORIENTATION = 274
UPRIGHT = 1


@dataclass(frozen=True)
class ImageFile:
    """An image that decodes from its first to its last byte; the size is the stored one, EXIF rotation is ignored."""

    file_name: str  # relative to the project's root where it lies below it, else absolute; forward slashes
    height: int
    width: int
    sha256: str


def inspect_images(paths: Sequence[Path], min_side_px: int) -> list[ImageFile | str]:
    """Read and decode every image; what was found, or in one line what is wrong with it, in the order of `paths`."""
    with ThreadPoolExecutor(thread_count()) as pool:  # decoding and hashing release the interpreter lock
        found = pool.map(lambda path: _inspect(path, min_side_px), paths)
        return list(progress(found, "images", "image", total=len(paths)))


def project_path(path: Path) -> str:
    """A path as the tables keep it: relative to the current directory (the project's root) where it lies below it."""
    absolute = Path(os.path.abspath(path))  # not resolve(): a data set that is linked into the project stays inside it
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


def _inspect(path: Path, min_side_px: int) -> ImageFile | str:
    name = project_path(path)
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            # The smallest scale a JPEG decodes to: every byte is still read, so a truncated file is found, in half
            # the time. Other formats ignore it.
            image.draft(None, (1, 1))
            image.load()
    except FileNotFoundError:
        return f"image {name}: not found"
    except UnidentifiedImageError:
        return f"image {name}: corrupt, or not one of {', '.join(FORMATS)}"
    except Exception as error:  # decoders raise whatever they trip over first in a damaged file
        return f"image {name}: cannot be read: {error}"
    if min(height, width) < min_side_px:
        return f"image {name}: {width}x{height} px, expected sides >= {min_side_px} px (ingest.min_image_side_px)"
    return ImageFile(name, height, width, hashlib.sha256(content).hexdigest())


def is_turned(path: str | Path) -> bool:
    """Whether an EXIF tag says to show the image turned or mirrored; the pipeline takes the pixels as stored."""
    with Image.open(path) as image:
        return bool(image.getexif().get(EXIF_ORIENTATION, UPRIGHT) != UPRIGHT)
