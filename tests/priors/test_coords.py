from __future__ import annotations

import pytest

from l2l_core.errors import ConfigError
from l2l_core.priors.coords import pixels_per_unit, qwen_input_hw, resolve_coord_space


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (476, 644)),  # 17.14 and 22.86 patches of 28 px -> 17 and 23
        (96, 96, (84, 84)),  # 3.43 -> 3
        (100, 42, (112, 56)),  # 3.57 -> 4; 1.5 -> 2 (to even)
        # 143 x 107 patches are over the budget of 1,280: scale sqrt(1003520 / 12e6) = 0.28918 -> 41.3 and 30.98, down
        (4000, 3000, (1148, 840)),
        # 1 x 1 patch is under the budget of 4: scale sqrt(3136 / 800) = 1.9799 -> 1.41 and 2.83, up
        (20, 40, (56, 84)),
    ],
)
def test_qwen_input_size(height: int, width: int, expected: tuple[int, int]) -> None:
    assert qwen_input_hw(height, width) == expected


@pytest.mark.parametrize(
    ("space", "x", "y"),
    [
        ("pixel", 1.0, 1.0),
        ("resized_pixel", 2.0, 4.0),  # seen as 200 x 320
        ("norm1000", 0.64, 0.8),
        ("percent", 6.4, 8.0),
        ("unit", 640.0, 800.0),
    ],
)
def test_one_unit_in_pixels(space: str, x: float, y: float) -> None:
    scale = pixels_per_unit(resolve_coord_space("any", space), (800, 640), (200, 320))
    assert scale.tolist() == pytest.approx([x, y])


@pytest.mark.parametrize(
    ("model", "space"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "resized_pixel"),
        ("qwen2.5-vl-7b", "resized_pixel"),
        ("Qwen/Qwen2-VL-7B-Instruct", "norm1000"),
        ("Qwen/Qwen3-VL-8B-Instruct", "norm1000"),
        ("OpenGVLab/InternVL2_5-8B", "norm1000"),
        ("allenai/Molmo-7B-D-0924", "percent"),
        ("llava-hf/llava-1.5-7b-hf", "unit"),
        ("vlm/refshapes-vlm", "percent"),
        ("llava/vlm/refshapes-vlm", "percent"),
    ],
)
def test_family_decides_the_space(model: str, space: str) -> None:
    assert resolve_coord_space(model, "auto") == space
    assert resolve_coord_space(model, "pixel") == "pixel"


def test_an_unknown_family_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"priors\.coord_space: .*'house-model-1'.*pixel\|resized_pixel\|norm1000"):
        resolve_coord_space("house-model-1", "auto")
