"""What a folder to serve holds beside weights: words of the base, dtypes, image sizes, ids."""

import dataclasses
import json
import shutil

import pytest

from tests.tiny_model import ASSETS
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_folder import complete_folder, with_dtype
from trimpi_jax.models.processor import load_processor

CONFIG = VLMConfig.from_hf(json.loads((ASSETS / "config.json").read_text()))


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture
def base(tmp_path):
    """The nano model's folder without weights, with a word that we do not know."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in ASSETS.glob("*.json"):
        shutil.copy(file, folder)
    fields = read(folder, "config.json") | {"a_word_of_its_own": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def out(tmp_path):
    """What `save_hf` leaves, but for the weights."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf("bfloat16")))
    return folder


def test_a_folder_is_complete(base, out):
    complete_folder(out, base, CONFIG, "bfloat16", load_processor(base, CONFIG))
    assert read(out, "config.json")["a_word_of_its_own"] == 1
    assert VLMConfig.from_hf(read(out, "config.json")) == CONFIG
    assert read(out, "generation_config.json") == {
        "bos_token_id": CONFIG.bos_token_id,
        "eos_token_id": list(CONFIG.eos_token_ids),
        "pad_token_id": CONFIG.pad_token_id,
    }
    template = (out / "chat_template.jinja").read_text()
    assert template == read(base, "tokenizer_config.json")["chat_template"]
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_generation_config_of_the_base_is_kept(base, out):
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    complete_folder(out, base, CONFIG, "bfloat16")
    assert read(out, "generation_config.json") == {"temperature": 0.5}


def test_words_of_another_model_are_not_kept(base, out):
    other = dataclasses.replace(CONFIG, pad_token_id=CONFIG.pad_token_id + 1)
    complete_folder(out, base, other, "bfloat16")
    assert "a_word_of_its_own" not in read(out, "config.json")


@pytest.mark.parametrize("nested", [False, True])
def test_image_sizes_of_the_run_go_with_its_model(base, out, nested):
    if nested:  # as transformers 5 writes them
        settings = read(base, "preprocessor_config.json")
        (base / "preprocessor_config.json").unlink()
        for name in ("min_pixels", "max_pixels"):
            del settings[name]
        (base / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    run = load_processor(base, CONFIG, min_pixels=4 * 784, max_pixels=12 * 784)
    complete_folder(out, base, CONFIG, "bfloat16", run)
    served = load_processor(out, CONFIG)
    assert (served.min_pixels, served.max_pixels) == (4 * 784, 12 * 784)
    fields = read(out, "processor_config.json" if nested else "preprocessor_config.json")
    assert fields.get("image_processor", fields)["size"] == {
        "shortest_edge": 4 * 784,
        "longest_edge": 12 * 784,
    }
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    settings = fields.get("image_processor", fields)
    theirs = reference.Qwen2VLImageProcessorPil(**settings)
    assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == (4 * 784, 12 * 784)


def test_dtypes_at_every_level_that_has_them():
    fields = {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 2},
        "vision_config": {"depth": 1},
    }
    assert with_dtype(fields, "float32") == {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "hidden_size": 2},
        "vision_config": {"depth": 1},
    }
    assert with_dtype({"hidden_size": 2}, "float16") == {"hidden_size": 2, "torch_dtype": "float16"}
    assert fields["torch_dtype"] == "bfloat16"  # the base's own dict is left alone
