"""The only reader of image files, and their inspection: validity, size and fingerprint.

Every part of the project reads images through `read_image`: ingest and check, the MLLM, training, predictions, pages.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from l2l_core.core.progress import progress
from l2l_core.core.threads import thread_count
from l2l_core.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""Supported formats; any other is refused. Only the first picture of an animated or multi-page file is read."""

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26
"""Largest image, Pillow's own bound (89 megapixels): a file of a few kilobytes can claim gigabytes of pixels."""

MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow's modes of 8 bits per channel with a clear RGB conversion. Pillow reads the high bytes of 16-bit color."""

DEEP_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
"""Gray of 16 bits; its high byte is used, as with 16-bit color."""

IMAGE_CACHE_BYTES = 2 << 30
"""Size limit of a cache of decoded images: a small dataset fits completely, a large one does not fill the memory."""

EXIF_ORIENTATION = 274
UPRIGHT = 1

warnings.simplefilter("error", Image.DecompressionBombWarning)  # lets `Image.open` itself refuse the size


@dataclass(frozen=True)
class ImageFile:
    """An image that decodes completely."""

    file_name: str  # relative to the project root if inside it, else absolute; forward slashes
    height: int  # of the pixels that `read_image` returns
    width: int
    sha256: str
    is_exif_rotated: bool = False  # an EXIF tag rotates or mirrors the image


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """An image file -> [H, W, 3] uint8 RGB, as stored: EXIF orientation is ignored, alpha is dropped, gray is repeated.

    Raises InputError with a one-line message if the file is missing, damaged, not one of FORMATS, of a mode without a
    plain RGB conversion (32-bit, floating point, LAB), or larger than MAX_PIXELS.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # reading a pipe or a device may never end
            raise InputError(f"{path}: not a regular file, expected an image")
        return _decode(path)[0]
    except FileNotFoundError:
        raise InputError(f"{path}: image not found") from None
    except InputError:
        raise
    except Exception as error:  # decoders raise many exception types on a damaged file
        raise InputError(f"{path}: {_reason(error)}") from None


def to_rgb(image: str | Path | Image.Image | NDArray[np.uint8], name: str = "image") -> NDArray[np.uint8]:
    """An image in any form -> [H, W, 3] uint8 RGB.

    image: path of a file (see `read_image`), a Pillow image, or an array [H, W, 3] (RGB) or [H, W] (gray), uint8. name:
    name in error messages of an image without a path. Raises InputError for anything else.

    >>> to_rgb(np.zeros((4, 6), np.uint8)).shape
    (4, 6, 3)
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            return _pixels(image)
        except Exception as error:
            raise InputError(f"{name}: {_reason(error)}") from None
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2:
            return np.repeat(image[..., None], 3, axis=2)
        if image.ndim == 3 and image.shape[2] == 3:
            return image
    got = f"an array {list(image.shape)} {image.dtype}" if isinstance(image, np.ndarray) else repr(image)
    raise InputError(f"{name}: got {got}, expected a path, a Pillow image, or an array [H, W, 3] or [H, W] of uint8")


def header_hw(file: Path | BinaryIO) -> tuple[int, int] | None:
    """Height and width that an image's header states; None if it has no readable header. Nothing is decoded."""
    try:
        if isinstance(file, Path) and not file.is_file():
            return None
        with Image.open(file, formats=FORMATS) as image:
            return image.height, image.width
    except Exception:  # decoders raise many exception types; the error is reported when the image is read
        return None


def inspect_images(paths: Sequence[Path], min_side_px: int) -> list[ImageFile | str]:
    """Read and decode every image; per image the result or a one-line error, in the order of `paths`."""
    with ThreadPoolExecutor(thread_count()) as pool:  # decoding and hashing release the interpreter lock
        found = pool.map(lambda path: _inspect(path, min_side_px), paths)
        return list(progress(found, "images", "image", total=len(paths)))


def project_path(path: Path) -> str:
    """A path as in the tables: relative to the current directory (the project root) if inside it, else absolute."""
    absolute = Path(os.path.abspath(path))  # not resolve(): a dataset linked into the project counts as inside
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


def visible(paths: Iterable[Path]) -> list[Path]:
    """Sorted paths without hidden files such as `._photo.jpg`, which macOS adds to each file."""
    return sorted(path for path in paths if not path.name.startswith("."))


def is_exif_rotated(path: str | Path) -> bool:
    """Whether an EXIF tag rotates or mirrors the image; the pipeline uses the pixels as stored."""
    with Image.open(path, formats=FORMATS) as image:
        return _is_exif_rotated(image)


def inspect_content(content: bytes, path: Path, min_side_px: int) -> ImageFile | str:
    """`inspect_images` for the bytes of one image; path: the file that has or will have this content."""
    name = project_path(path)
    try:
        pixels, turned = _decode(io.BytesIO(content))
    except Exception as error:
        return f"image {name}: {_reason(error)}"
    height, width = pixels.shape[:2]
    if min(height, width) < min_side_px:
        return f"image {name}: {width}x{height} px, expected sides >= {min_side_px} px (ingest.min_image_side_px)"
    return ImageFile(name, height, width, hashlib.sha256(content).hexdigest(), turned)


def _inspect(path: Path, min_side_px: int) -> ImageFile | str:
    try:
        if path.exists() and not path.is_file():
            return f"image {project_path(path)}: not a regular file"
        content = path.read_bytes()
    except FileNotFoundError:
        return f"image {project_path(path)}: not found"
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        return f"image {project_path(path)}: {_reason(error)}"
    return inspect_content(content, path, min_side_px)


def _decode(file: str | Path | BinaryIO) -> tuple[NDArray[np.uint8], bool]:
    """Pixels [H, W, 3] uint8 RGB, and whether an EXIF tag rotates or mirrors them. Passes on any decoder error."""
    with Image.open(file, formats=FORMATS) as image:
        pixels = _pixels(image)  # first: Pillow applies a TIFF's orientation when decoding
        return pixels, _is_exif_rotated(image)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB. Passes on any decoder error."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if image.mode in DEEP_MODES:
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in MODES:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    raise ValueError(
        f"its pixels are of Pillow's mode {image.mode}, expected gray, palette, RGB or CMYK of 8 bits, "
        "or gray or RGB of 16 bits"
    )


def _is_exif_rotated(image: Image.Image) -> bool:
    if image.format == "TIFF":  # Pillow itself applies the orientation when decoding
        return False
    try:
        return bool(image.getexif().get(EXIF_ORIENTATION, UPRIGHT) != UPRIGHT)
    except Exception:  # a broken EXIF block is ignored; the pixels are intact
        return False


def _reason(error: Exception) -> str:
    """A one-line description of an image error."""
    if isinstance(error, UnidentifiedImageError):
        return f"corrupt, or not one of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too many pixels, expected at most {MAX_PIXELS // 10**6} megapixels; make it smaller"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"cannot be read: {detail}"
