"""The paper's experiments: every size, task and method makes a config that its parts take."""

import dataclasses

import pytest

from configs import qwen2_5_vl
from configs.methods import METHODS, rl_rollouts
from data_pipelines.build import DATASETS, make_settings
from trimpi_jax.stages.model_files import open_base
from trimpi_jax.stages.run_settings import optimizer_settings
from trimpi_jax.stages.train_state import TRAINABLE


@pytest.mark.parametrize("task", qwen2_5_vl.TASKS)
def test_every_task_has_settings_that_its_dataset_takes(task):
    config = qwen2_5_vl.get_config(f"task={task}")
    assert config.name == f"qwen2_5_vl_3b-{task}-trimpi_poro_grpo"
    options = config.data.to_dict()
    dataset = options.pop("dataset")
    assert dataset == {"g": "gta_policy", "o": "own", "c": "clevr_policy"}[task[0]]
    assert dataset in DATASETS
    if task == "own":
        with pytest.raises(ValueError, match=r"config\.data\.source"):
            make_settings(dataset, options)
        options["source"] = "/some/folder"
    settings = make_settings(dataset, options)
    if not task.startswith("clevr"):
        assert config.row_buckets == "auto" and config.max_pixels == 512 * 28 * 28
    else:
        assert max(config.prompt_buckets) < max(config.row_buckets)
        assert min(config.prompt_buckets) + config.max_new_tokens <= max(config.row_buckets)
        variant, depth = task[-2:]
        assert (settings.variant, settings.depth) == (variant.upper(), int(depth))
        sizes = (settings.policies, settings.train_per_policy, settings.test)
        assert sizes == (10, 2000, 2000)
        assert 2000 < 10 * settings.cot_per_policy < 2600


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["clevr_t6", "gta"])
def test_every_method_has_the_papers_numbers(method, task):
    config = qwen2_5_vl.get_config(f"size=7b,task={task},method={method}")
    gta = task == "gta"
    assert config.stages == METHODS[method]
    for stage in config.stages:
        section = config[stage]
        assert optimizer_settings(section, 10).learning_rate > 0
        assert section.trainable in TRAINABLE
        assert section.micro_batches == 0  # one row a device, on however many devices
    if "vm_cpt" in config:
        section = config.vm_cpt
        assert (section.learning_rate, section.epochs, section.batch, section.trainable) == (
            *(1e-5, 5, 64 if gta else 128),
            "all",
        )
    for stage, epochs in (("direct_sft", 2), ("cot_sft", 5)):
        if stage in config:
            section = config[stage]
            assert (section.learning_rate, section.lora_rank, section.trainable) == (
                1e-4,
                8,
                "lora",
            )
            assert (section.epochs, section.batch) == ((10, 32) if gta else (epochs, 64))
    if "rl" in config:
        section = config.rl
        assert (section.learning_rate, section.update_prompts, section.trainable) == (
            1e-6,
            32,
            "all",
        )
        assert (section.steps, section.prompts) == ((50, 256) if gta else (104, 384))
        assert section.clip_low == 0.2
        assert (section.clip_high, section.get("kl_beta", 0.0)) == (
            (0.28, 0.0) if "dapo" in method else (0.3, 0.01)
        )
        assert section.prompts % section.update_prompts == 0


@pytest.mark.parametrize("task", ["clevr_t6", "gta"])
def test_distillation_samples_as_much_as_rl(task):
    config = qwen2_5_vl.get_config(f"task={task},method=trimpi_distillation")
    rl = qwen2_5_vl.get_config(f"task={task}").rl
    assert config.distillation.rollouts == rl_rollouts(rl)
    assert config.distillation.samples == 2 * rl.group_size


def test_the_defaults():
    assert qwen2_5_vl.parse_argument(None) == ("3b", "clevr_t6", "trimpi_poro_grpo")
    assert qwen2_5_vl.parse_argument("size=72b") == ("72b", "clevr_t6", "trimpi_poro_grpo")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("size=7B", r"unknown size '7B'; did you mean 7b\?"),
        ("task=clevr_t5", r"unknown task 'clevr_t5'; did you mean clevr_t"),
        ("task=gta,method=trimpi_poro_grop", "did you mean trimpi_poro_grpo"),
        ("tusk=gta", "each once; got 'tusk=gta'"),
        ("size=3b,size=7b", "each once"),
        ("task=", "each once"),
    ],
)
def test_a_wrong_argument_is_told(argument, message):
    with pytest.raises(ValueError, match=message):
        qwen2_5_vl.get_config(argument)


def test_the_buckets_hold_what_was_measured():
    """ClevrPolicy-T in Qwen2.5 tokens: documents, and the longest of many chains of thought."""
    for depth, (policy, cot) in {2: (125, 118), 4: (584, 190), 6: (2396, 260)}.items():
        config = qwen2_5_vl.get_config(f"task=clevr_t{depth}")
        free, aware = config.prompt_buckets
        assert free >= qwen2_5_vl.FREE_TOKENS and aware >= qwen2_5_vl.FREE_TOKENS + policy
        assert config.max_new_tokens >= 1.3 * cot
        assert all(bucket % 128 == 0 for bucket in (*config.prompt_buckets, *config.row_buckets))


def test_a_model_of_another_size_is_refused():
    config = qwen2_5_vl.get_config("size=7b")
    with pytest.raises(ValueError, match=r"--config\.model_dir=/path"):
        open_base(config)
    config.model_dir = "/no/such/folder"
    with pytest.raises(FileNotFoundError, match="no/such/folder is not a folder"):
        open_base(config)
    config.model_dir = "assets/nano"
    with pytest.raises(ValueError, match=r"for size 7b, the model folder is another: .'width 128"):
        open_base(config)


def test_settings_are_plain_values():
    """What the workdir keeps as JSON is what the next start compares with."""
    config = qwen2_5_vl.get_config("task=clevr_m6")
    settings = make_settings(
        "clevr_policy", {k: v for k, v in config.data.items() if k != "dataset"}
    )
    assert dataclasses.asdict(settings)["variant"] == "M"
