"""Image reading: every entry point sees the same pixels and refuses the same files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from l2l_core.config import load_params
from l2l_core.core import images
from l2l_core.core.images import ImageFile, inspect_images, is_exif_rotated, read_image, visible
from l2l_core.core.mask_forms import read_mask
from l2l_core.data.pairs import ImageStore
from l2l_core.errors import InputError
from l2l_core.inference.predict_files import pairs_of_paths
from l2l_core.mllm.backend import Question
from l2l_core.mllm.engine import Completion, MllmBackend, Request

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (40, 50), dtype=np.uint16)
COMPRESSIONS = [None, "tiff_lzw", "tiff_deflate", "packbits", "group4", "jpeg", "lzma", "zstd"]


def saved(image: Image.Image, path: Path, **more: object) -> Path:
    image.save(path, **more)
    return path


def of_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(DEEP)
    if mode == "PA":
        return Image.fromarray(RGB).convert("P").convert("PA")
    return Image.fromarray(RGB).convert(mode)


class Recorder:
    """An engine that records the images it receives."""

    precision = None

    def __init__(self) -> None:
        self.images: list[Image.Image] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.images += [request.image for request in requests]
        return [Completion("") for _ in requests]


def seen_by_mllm(path: Path) -> np.ndarray | str:
    """The pixels sent to a multimodal LLM, or the reason why none are sent."""
    engine = Recorder()
    params = load_params().priors.model_copy(
        update={"backend": "openai", "model": "qwen3-vl", "coord_space": "norm1000", "retries": 0}
    )
    (response,) = MllmBackend(engine, params).query([Question(0, 0, str(path), (40, 50), "cup")])
    return np.asarray(engine.images[0]) if engine.images else response.reason


def test_reads_rgb_gray_and_alpha_images_as_rgb(tmp_path):
    alpha = np.dstack([RGB, np.full((40, 50), 9, np.uint8)])
    for name, stored, expected in (
        ("rgb.png", RGB, RGB),
        ("alpha.png", alpha, RGB),
        ("grey.png", RGB[..., 0], np.repeat(RGB[..., :1], 3, axis=2)),
    ):
        pixels = read_image(saved(Image.fromarray(stored), tmp_path / name))
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


def test_reads_palette_colors_and_the_first_frame_of_an_animation(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    expected = [[[10, 20, 30], [200, 100, 0]], [[200, 100, 0], [10, 20, 30]]]
    assert read_image(saved(palette, tmp_path / "palette.png")).tolist() == expected
    red, blue = (Image.new("RGB", (8, 6), color) for color in ("red", "blue"))
    for name in ("moving.png", "moving.tif"):
        moving = saved(red, tmp_path / name, save_all=True, append_images=[blue])
        assert read_image(moving).tolist() == np.asarray(red).tolist()


def test_reads_the_high_byte_of_16_bit_images(tmp_path):
    expected = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("deep.png", "deep.tif"):
        np.testing.assert_array_equal(read_image(saved(Image.fromarray(DEEP), tmp_path / name)), expected)
    color = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    cv2.imwrite(str(tmp_path / "color.png"), color[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "color.png"), (color >> 8).astype(np.uint8))


def test_reads_ordinary_photos_bit_identically_to_opencv(tmp_path):
    smooth = cv2.GaussianBlur(RNG.integers(0, 256, (99, 131, 3), dtype=np.uint8), (0, 0), 2)
    for name in ("95.jpg", "75.jpg", "png.png", "grey.jpg"):
        photo = Image.fromarray(smooth if name != "grey.jpg" else smooth[..., 0])
        path = saved(photo, tmp_path / name, quality=75 if name == "75.jpg" else 95)
        expected = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]
        np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16", "PA"])
@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_entry_point_reads_the_same_pixels_or_refuses_the_file(tmp_path, kind, mode):
    for compression in COMPRESSIONS if kind == "TIFF" else COMPRESSIONS[:1]:
        path = tmp_path / f"{compression}.bin"
        try:
            of_mode(mode).save(path, format=kind, **({"compression": compression} if compression else {}))
        except (OSError, RuntimeError, ValueError):  # a combination that the format does not support
            continue
        (found,) = inspect_images([path], 1)
        if isinstance(found, ImageFile):
            pixels = read_image(path)
            assert pixels.shape == (found.height, found.width, 3) == (40, 50, 3)
            np.testing.assert_array_equal(ImageStore([str(path)], 50)[0].shape, (50, 50, 3))
            np.testing.assert_array_equal(seen_by_mllm(path), pixels)
            assert pairs_of_paths([path], "cup").images == [found]
        else:
            assert mode in ("LAB", "I", "F")
            assert "expected gray, palette, RGB or CMYK of 8 bits, or gray or RGB of 16 bits" in found
            for use in (
                read_image,
                lambda path: ImageStore([str(path)], 50)[0],
                lambda path: pairs_of_paths([path], "cup"),
            ):
                with pytest.raises(InputError, match=f"mode {mode}"):
                    use(path)
            assert f"mode {mode}" in seen_by_mllm(path)


def png(width: int, height: int, *, end: bool = True) -> bytes:
    """A black PNG with one bit per pixel, built by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 100))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + (chunk(b"IEND", b"") if end else b"")


def test_check_and_training_treat_truncated_files_alike(tmp_path):
    (tmp_path / "noend.png").write_bytes(png(20, 20, end=False))
    assert isinstance(inspect_images([tmp_path / "noend.png"], 1)[0], ImageFile)
    assert not read_image(tmp_path / "noend.png").any()
    photo = io.BytesIO()
    Image.fromarray(RGB).save(photo, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(photo.getvalue()[:-600])
    (found,) = inspect_images([tmp_path / "cut.jpg"], 1)
    assert "truncated" in found
    with pytest.raises(InputError, match="truncated"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("size", [(9500, 9500), (14000, 14000), (60000, 60000)])
def test_refuses_images_above_the_pixel_limit(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    expected = "bomb.png: too many pixels, expected at most 89 megapixels; make it smaller"
    assert inspect_images([tmp_path / "bomb.png"], 1)[0].endswith(expected)
    with pytest.raises(InputError, match=expected):
        read_image(tmp_path / "bomb.png")


def test_names_an_unreadable_image(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"this is no picture")
    (tmp_path / "cut.png").write_bytes(png(9, 9)[:30])
    Image.fromarray(RGB).save(tmp_path / "moving.gif")
    with pytest.raises(InputError, match=r"none\.jpg: image not found"):
        read_image(tmp_path / "none.jpg")
    for name in ("empty.jpg", "text.jpg", "cut.png", "moving.gif"):
        with pytest.raises(InputError, match=f"{name}: (corrupt, or not one of JPEG, PNG, WEBP, BMP, TIFF|cannot)"):
            read_image(tmp_path / name)
    for name in (tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            read_image(name)
        assert "not a regular file" in inspect_images([Path(name)], 1)[0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_keeps_stored_pixels_and_detects_exif_rotation(tmp_path, orientation, suffix):
    note = Image.Exif()
    note[images.EXIF_ORIENTATION] = orientation
    path = saved(Image.fromarray(RGB), tmp_path / f"photo.{suffix}", exif=note)
    (found,) = inspect_images([path], 1)
    assert isinstance(found, ImageFile)
    assert found.is_exif_rotated == is_exif_rotated(path) == (orientation != 1)
    assert read_image(path).shape == (found.height, found.width, 3) == (40, 50, 3)


def test_reads_an_image_with_a_broken_exif_block(tmp_path):
    path = saved(Image.fromarray(RGB), tmp_path / "photo.png", exif=b"Exif\0\0garbage that is no TIFF header")
    (found,) = inspect_images([path], 1)
    assert isinstance(found, ImageFile)
    assert not found.is_exif_rotated
    assert np.array_equal(read_image(path), RGB)


def test_skips_hidden_files(tmp_path):
    for name in ("b.jpg", "a.jpg", "._a.jpg", ".DS_Store"):
        (tmp_path / name).touch()
    assert [path.name for path in visible(tmp_path.iterdir())] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "", "."])
def test_every_entry_refuses_impossible_names(name: str) -> None:
    (found,) = inspect_images([Path(name)], 1)
    assert isinstance(found, str)
    with pytest.raises(InputError):
        read_image(Path(name))


def test_every_entry_refuses_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        (found,) = inspect_images([path], 1)
        assert str(found).endswith("not a regular file")
        with pytest.raises(InputError, match="not a regular file"):
            read_image(path)
        assert images.header_hw(path) is None
        with pytest.raises(ValueError, match="not a readable PNG: not a regular file"):
            read_mask(str(path), Path(), 40, 50)
