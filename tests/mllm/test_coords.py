from __future__ import annotations

import pytest

from l2l_core.errors import ConfigError
from l2l_core.mllm.coords import (
    COORD_SPACES,
    is_y_first,
    origin_px,
    pixels_per_unit,
    qwen_input_hw,
    resolve_coord_space,
    scale_of,
    sent_hw,
)


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
def test_qwen_input_hw_rounds_to_patches_within_the_pixel_budget(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    assert qwen_input_hw(height, width) == expected


@pytest.mark.parametrize(
    ("space", "x", "y"),
    [
        ("pixel", 1.0, 1.0),
        ("resized_pixel", 2.0, 4.0),  # seen as 200 x 320
        ("norm1000", 0.64, 0.8),
        ("percent", 6.4, 8.0),
        ("unit", 640.0, 800.0),
        ("norm1000_yx", 0.64, 0.8),
        ("norm999", 640 / 999, 800 / 999),
        ("norm1024_yx", 0.625, 0.78125),
        ("unit_square", 800.0, 800.0),
    ],
)
def test_pixels_per_unit_matches_the_coordinate_space(space: str, x: float, y: float) -> None:
    scale = pixels_per_unit(resolve_coord_space("any", space), (800, 640), (200, 320))
    assert scale.tolist() == pytest.approx([x, y])


@pytest.mark.parametrize(
    ("model", "space"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "resized_pixel"),
        ("qwen2.5-vl-7b", "resized_pixel"),
        ("Qwen/Qwen2-VL-7B-Instruct", "norm1000"),
        ("Qwen/Qwen3-VL-8B-Instruct", "norm1000"),
        ("Qwen/Qwen3-VL-235B-A22B-Instruct", "norm1000"),
        ("qwen2_5_vl", "resized_pixel"),
        ("OpenGVLab/InternVL2_5-8B", "norm1000"),
        ("OpenGVLab/InternVL3_5-8B", "norm1000"),
        ("openbmb/MiniCPM-V-4_5", "norm1000"),
        ("openbmb/MiniCPM-o-2_6", "norm1000"),
        ("microsoft/Florence-2-large", "norm1000"),
        ("models/gemini-2.5-flash", "norm1000_yx"),
        ("gemini-3-pro-preview", "norm1000_yx"),
        ("google/paligemma-3b-mix-224", "norm1024_yx"),
        ("google/paligemma2-3b-mix-448", "norm1024_yx"),
        ("deepseek-ai/deepseek-vl2-tiny", "norm999"),
        ("allenai/Molmo-7B-D-0924", "percent"),
        ("allenai/MolmoE-1B-0924", "percent"),
        ("allenai/Molmo2-8B", "norm1000"),
        ("microsoft/kosmos-2-patch14-224", "unit"),
        ("llava-hf/llava-1.5-7b-hf", "unit_square"),
        ("liuhaotian/llava-v1.5-13b", "unit_square"),
        ("gemini-robotics-er-1.5-preview", "norm1000_yx"),
        ("zai-org/GLM-4.5V", "norm1000"),
        ("zai-org/GLM-4.6V-Flash", "norm1000"),
        ("zai-org/GLM-4.1V-9B-Thinking", "norm1000"),
        ("ByteDance-Seed/Seed1.5-VL", "norm1000"),
        ("doubao-1.5-vision-pro", "norm1000"),
        ("doubao-1-5-thinking-vision-pro-250428", "norm1000"),
        ("IDEA-Research/Rex-Omni", "norm999"),
        ("Vision-CAIR/MiniGPT-v2", "percent"),
        ("AIDC-AI/Ovis2.5-9B", "unit"),
        ("vikhyatk/moondream2", "unit"),
        ("moondream/moondream3-preview", "unit"),
        ("C:\\models\\Qwen2.5-VL-7B", "resized_pixel"),
        ("vlm/refshapes-vlm", "percent"),
        ("llava/vlm/refshapes-vlm", "percent"),
    ],
)
def test_auto_resolves_the_space_from_the_model_family(model: str, space: str) -> None:
    assert resolve_coord_space(model, "auto") == space
    assert resolve_coord_space(model, "pixel") == "pixel"


@pytest.mark.parametrize(
    "model",
    [
        "Qwen/Qwen4-VL-8B",
        "Qwen/Qwen3.5-VL-8B",
        "Qwen/Qwen2.5-Omni-7B",
        "OpenGVLab/InternVL4-8B",
        "allenai/Molmo3-8B",
        "allenai/MolmoAct-7B-D-0812",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava",
        "gemini-4-pro",
        "google/paligemma3-3b",
        "microsoft/kosmos-2.5",
        "openbmb/MiniCPM-V-4_6",
        "gemini-3.5-flash",
        "gemini-robotics-er-2-preview",
        "zai-org/GLM-4V-9B",
        "zai-org/GLM-4.7V",
        "zai-org/GLM-4.5",
        "doubao-seed-1-6-vision-250815",
        "AIDC-AI/Ovis2-8B",
        "moondream/moondream4",
        "Vision-CAIR/MiniGPT-4",
        "qwen2.5-vl/my-model",  # the parent folder does not identify the model
        "qwen2.5-vl-to-internvl3",  # two families
    ],
)
def test_auto_refuses_successors_and_relatives_of_known_families(model: str) -> None:
    with pytest.raises(ConfigError, match=r"priors\.coord_space: .* is unknown; set it to pixel\|"):
        resolve_coord_space(model, "auto")
    assert resolve_coord_space(model, "norm1000_yx") == "norm1000_yx"


def test_unit_square_origin_lies_in_the_padding_around_the_image() -> None:
    """A 400 x 100 image in a 400 px square has 150 px of padding above and below."""
    assert origin_px("unit_square", (100, 400)).tolist() == [0, -150]
    assert origin_px("unit_square", (400, 100)).tolist() == [-150, 0]
    assert origin_px("unit", (100, 400)).tolist() == [0, 0]


def test_is_y_first_detects_spaces_that_write_y_before_x() -> None:
    assert [space for space in ("norm1000", "norm1000_yx", "pixel_yx", "unit") if is_y_first(space)] == [
        "norm1000_yx",
        "pixel_yx",
    ]


def test_swapped_axes_keep_the_scale_and_the_image_size() -> None:
    scales = [space for space in COORD_SPACES if not is_y_first(space)]
    assert 2 * len(scales) == len(COORD_SPACES)
    for space in scales:
        (swapped,) = (other for other in COORD_SPACES if other == f"{space}_yx")
        assert scale_of(swapped) == scale_of(space) == space
        sizes = ((800, 640), (200, 320))
        assert pixels_per_unit(swapped, *sizes).tolist() == pixels_per_unit(space, *sizes).tolist()
        assert origin_px(swapped, (100, 400)).tolist() == origin_px(space, (100, 400)).tolist()
        assert sent_hw(swapped, (2000, 4000), 1_003_520) == sent_hw(space, (2000, 4000), 1_003_520)


def test_unknown_family_error_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"priors\.coord_space: .*'house-model-1'.*pixel\|resized_pixel\|norm1000"):
        resolve_coord_space("house-model-1", "auto")
