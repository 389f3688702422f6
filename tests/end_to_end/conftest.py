"""A tiny untrained base model and a config of seconds, for runs of the whole pipeline."""

import importlib.util
from pathlib import Path

import jax
import pytest

from trimpi_jax.models import vlm
from trimpi_jax.models.hf_weights import save_hf
from trimpi_jax.models.processor import copy_processor_files
from trimpi_jax.stages.nano_base import make_model_config

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / "trimpi_jax" / "assets" / "nano"


def load_config(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def shrink_model(config):
    """The nano architecture with two layers of width 32."""
    model = config.model
    model.width = model.vision_width = 32
    model.depth = model.vision_depth = 2
    model.heads, model.kv_heads, model.head_width = 2, 1, 16
    model.mlp_width = model.vision_mlp_width = 64
    model.mrope_section = (2, 3, 3)
    model.vision_heads = 2
    model.full_attention_blocks = (1,)
    return config


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A Hugging Face folder of random weights with the nano tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_base")
    config = make_model_config(shrink_model(load_config("nano_base")))
    save_hf(folder, config, jax.device_get(vlm.init_params(config, jax.random.key(0))))
    copy_processor_files(ASSETS, folder)
    return folder


OVERRIDES = {
    "data.train_per_policy": 12,
    "data.cot_per_policy": 8,
    "data.test": 8,
    "data.override": 8,
    "eval.examples": 8,
    "eval.every_steps": 2,
    "eval.rows": 8,
    "max_new_tokens": 12,
    "row_buckets": (192,),
    "save_every": 2,
    "mesh.data": 1,
    "mesh.fsdp": -1,  # all fake devices of the test session
    "vm_cpt.epochs": 1,
    "vm_cpt.batch": 8,
    "cot_sft.epochs": 1,
    "cot_sft.batch": 8,
    "rl.steps": 3,
    "rl.prompts": 8,
    "rl.update_prompts": 8,
    "rl.group_size": 1,
}


@pytest.fixture
def tiny_config(tiny_base):
    config = load_config("nano", "method=trimpi_poro_grpo")
    config.model_dir = str(tiny_base)
    config.update_from_flattened_dict(OVERRIDES)
    return config
