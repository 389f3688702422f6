"""Image sizes, templates in every place they are kept, and folders that cannot be used."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.tiny_model import ASSETS
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import (
    encode_prompt_tokens,
    encode_text,
    load_processor,
    resize_image,
    smart_resize,
)

CONFIG = VLMConfig.from_hf(json.loads((ASSETS / "config.json").read_text()))
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]


@pytest.fixture
def folder(tmp_path):
    """A copy of the nano model's folder without its weights."""
    for file in ASSETS.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
    return tmp_path


def edit(folder, name, **changes):
    fields = json.loads((folder / name).read_text())
    for key, value in changes.items():
        if value is None:
            fields.pop(key, None)
        else:
            fields[key] = value
    (folder / name).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("height", "width", "limits", "expected"),
    [
        # 480x320 is CLEVR: 320 / 28 = 11.43, 480 / 28 = 17.14
        (320, 480, (3136, 10**7), (308, 476)),
        # halves go to the even neighbour: 42 = 1.5 cells -> 2, 70 = 2.5 -> 2, 98 = 3.5 -> 4
        (42, 70, (784, 10**7), (56, 56)),
        (98, 126, (784, 10**7), (112, 112)),
        # 1000x1000 = 36 x 36 cells; at most 100 cells: scale sqrt(10^6 / 78400), floor of 10 -> 10
        (1000, 1000, (784, 100 * 784), (280, 280)),
        # 28x28 must have 3136 px: scale 2, ceil
        (28, 28, (3136, 10**7), (56, 56)),
        # a side of 10 px rounds to nothing, so the image is scaled to the smallest area
        (10, 2000, (3136, 10**7), (28, 812)),
        (1, 200, (3136, 10**7), (28, 812)),
    ],
)
def test_smart_resize_by_hand(height, width, limits, expected):
    result = smart_resize(height, width, factor=28, min_pixels=limits[0], max_pixels=limits[1])
    assert result == expected


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_an_aspect_ratio_above_200_is_refused(size):
    with pytest.raises(ValueError, match="aspect ratio above 200"):
        smart_resize(*size, factor=28, min_pixels=784, max_pixels=10**6)


def test_the_folder_says_the_sizes_and_the_run_may_say_others(folder):
    own = load_processor(folder, CONFIG)
    assert (own.min_pixels, own.max_pixels) == (784, 18816)
    other = load_processor(folder, CONFIG, min_pixels=3136, max_pixels=4 * 784)
    image = np.zeros((84, 112, 3), np.uint8)
    assert resize_image(image, own).shape == (84, 112, 3)
    assert resize_image(image, other).shape == (28, 56, 3)
    edit(folder, "preprocessor_config.json", min_pixels=None, max_pixels=None)  # transformers 5
    assert load_processor(folder, CONFIG).max_pixels == 18816
    edit(folder, "preprocessor_config.json", size=None)
    assert load_processor(folder, CONFIG).max_pixels == 28 * 28 * 1280
    with pytest.raises(ValueError, match="min_pixels 5000 and max_pixels 784 are no range"):
        load_processor(folder, CONFIG, min_pixels=5000, max_pixels=784)


def test_image_settings_as_transformers_5_writes_them(folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    nested = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load_processor(folder, CONFIG).max_pixels == 18816


def test_a_template_in_each_of_its_places(folder):
    here = load_processor(folder, CONFIG)
    template = here.tokenizer.chat_template
    expected = encode_prompt_tokens(here, QUESTION, [(56, 84)])
    assert (expected == CONFIG.image_token_id).sum() == 6
    # the older form: the template with images in its own file, one without in the tokenizer's
    edit(folder, "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokens = encode_prompt_tokens(load_processor(folder, CONFIG), QUESTION, [(56, 84)])
    np.testing.assert_array_equal(tokens, expected)
    # the newest form wins
    (folder / "chat_template.jinja").write_text(template.replace("helpful", "useful"))
    tokens = encode_prompt_tokens(load_processor(folder, CONFIG), QUESTION, [(56, 84)])
    assert "useful assistant" in here.tokenizer.decode(tokens)


def test_stop_tokens_of_the_generation_config_count_too(folder):
    assert load_processor(folder, CONFIG).stop_token_ids == CONFIG.eos_token_ids
    first = CONFIG.eos_token_ids[0]
    one = dataclasses.replace(CONFIG, eos_token_ids=(first,))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 3]}))
    assert load_processor(folder, one).stop_token_ids == (first, 3)


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _edit(name, **changes):
    return lambda folder: edit(folder, name, **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"lacks \['tokenizer.json'\]"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config"),
        (_write("preprocessor_config.json", "{"), r"preprocessor_config\.json is not valid JSON"),
        (_write("chat_template.json", "[]"), r"chat_template\.json holds no chat template"),
        (_write("generation_config.json", "[]"), r"generation_config\.json is no JSON object"),
        (_edit("tokenizer_config.json", chat_template=None), "has no chat template"),
        (
            _edit("tokenizer_config.json", chat_template="{{ messages[0].role }}"),
            "does not place images.*0 image marks.*text-only",
        ),
        (
            _edit("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5], patch_size=16),
            r"otherwise than here: patch_size 16 instead of 14; image_mean \[0.5, 0.5, 0.5\]",
        ),
        (_edit("preprocessor_config.json", resample=2), "resample 2 instead of 3"),
        (_edit("preprocessor_config.json", do_normalize=False), "do_normalize False"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_processor(folder, CONFIG)


def test_a_tokenizer_of_another_model_is_told(folder):
    other = dataclasses.replace(CONFIG, image_token_id=7)
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is id \d+ .* image_token_id is 7"):
        load_processor(folder, other)
    small = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=100))
    with pytest.raises(ValueError, match="more than vocab_size 100"):
        load_processor(folder, small)


def test_a_placeholder_in_a_text_is_found_out(folder):
    processor = load_processor(folder, CONFIG)
    sneaky = [{"role": "user", "content": "what is <|image_pad|>?"}]
    assert CONFIG.image_token_id in encode_text(processor, "<|image_pad|>")
    with pytest.raises(ValueError, match="1 image marks but 0 images"):
        encode_prompt_tokens(processor, sneaky, [])
