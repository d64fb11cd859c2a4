"""The processor's configuration: what is understood and what is refused by name."""

import pytest

from joyjax.errors import ConfigError
from joyjax.processors.vision import VisionProcessorConfig

PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_resize": True,
    "resample": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 1024, "longest_edge": 65536},
}


def bounds(**changed):
    raw = {key: value for key, value in {**PROCESSOR, **changed}.items() if value != "absent"}
    config = VisionProcessorConfig.from_json(raw)
    return config.min_pixels, config.max_pixels


def test_the_area_stands_in_size_or_in_the_older_names():
    assert bounds() == (1024, 65536)
    assert bounds(min_pixels=None, max_pixels=None) == (1024, 65536)
    assert bounds(size="absent", min_pixels=64, max_pixels=128) == (64, 128)
    assert bounds(size={"min_pixels": 64, "max_pixels": 128}) == (64, 128)
    assert bounds(max_pixels=2048) == (1024, 2048)


@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"])
def test_every_back_end_of_the_processor_is_accepted(kind):
    VisionProcessorConfig.from_json({**PROCESSOR, "image_processor_type": kind})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_processor_type", "CLIPImageProcessor"),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_convert_rgb", False),
        ("do_center_crop", True),
        ("do_pad", True),
        ("resample", 2),
        ("rescale_factor", 0.5),
        ("data_format", "channels_last"),
        ("size", {"height": 224, "width": 224}),
        ("size", 224),
        ("min_pixels", "1024"),
        ("max_pixels", 1000),
        ("min_pixels", 0),
        ("patch_size", 0),
        ("merge_size", -1),
        ("temporal_patch_size", 2.5),
        ("image_mean", [0.5]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5, 0]),
        ("sharpen", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"the file: .*({key}|{value}|positive)"):
        VisionProcessorConfig.from_json({**PROCESSOR, key: value}, where="the file")


@pytest.mark.parametrize("key", ["patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "size"])
def test_missing_keys_have_no_defaults(key):
    raw = {name: value for name, value in PROCESSOR.items() if name != key}
    with pytest.raises(ConfigError, match="min_pixels" if key == "size" else key):
        VisionProcessorConfig.from_json(raw)
