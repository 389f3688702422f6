"""Sizes left to "auto" are filled from the shards, sizes that are written are kept."""

import pytest

from data_pipelines.build import DATASETS, make_settings
from tests.data_pipelines.own_policy.folders import example, write_folder
from tests.end_to_end.conftest import ASSETS, load_config
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.models.processor import load_processor
from trimpi_jax.stages.auto_sizes import fill_auto_sizes

CONFIG = ("own_policy", "method=trimpi_poro_grpo")


@pytest.fixture(scope="module")
def processor():
    return load_processor(ASSETS, load_hf(ASSETS)[0])


def shards(folder, **fields):
    lines = [example(i, **fields) for i in range(6)]
    source = write_folder(folder / "desk", lines=lines)
    splits = DATASETS["own"].make_splits(
        make_settings("own", {"source": str(source)}), lambda done, total: None
    )
    return {name: list(examples) for name, examples in splits.items()}


def test_auto_sizes_hold_every_row(tmp_path, processor):
    data = shards(tmp_path, cot="I see a grey picture, so the answer is clear.")
    config = load_config(*CONFIG)
    filled = fill_auto_sizes(config, data, processor)
    assert config.row_buckets == "auto"  # the config of the workdir is not changed
    assert filled.windows == (1, 2)  # pictures of 40x30 px: one cell each, policy and input
    free, aware = filled.prompt_buckets
    assert free < aware <= filled.row_buckets[-1]
    assert filled.max_new_tokens % 8 == 0
    assert filled.vm_cpt == config.vm_cpt


def test_written_sizes_are_kept(tmp_path, processor):
    data = shards(tmp_path, cot="So.")
    config = load_config(*CONFIG)
    config.row_buckets, config.max_new_tokens = "600,200", "48"
    filled = fill_auto_sizes(config, data, processor)
    assert (filled.row_buckets, filled.max_new_tokens) == ((200, 600), 48)
    config.windows, config.prompt_buckets = "9", "400"
    filled = fill_auto_sizes(config, {"never": [None]}, processor)  # nothing is measured
    assert (filled.windows, filled.prompt_buckets) == ((9,), (400,))
    for key, text in (("row_buckets", "many"), ("max_new_tokens", "8,9"), ("windows", "0")):
        wrong = load_config(*CONFIG)
        wrong[key] = text
        with pytest.raises(ValueError, match=f"config.{key} is '{text}'"):
            fill_auto_sizes(wrong, data, processor)


def test_stages_that_need_thoughts_say_so(tmp_path, processor):
    data = shards(tmp_path)
    with pytest.raises(ValueError, match=r"\['vm_cpt', 'cot_sft'\] train on examples with a chain"):
        fill_auto_sizes(load_config(*CONFIG), data, processor)
    filled = fill_auto_sizes(load_config("own_policy", "method=direct_sft"), data, processor)
    assert len(filled.row_buckets) == 1
