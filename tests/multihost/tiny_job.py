"""A three-stage job of seconds for `--config tests/multihost/tiny_job.py:FOLDER,METHOD`.

FOLDER holds base/, a tiny model that ends its answers early and late, and data/.
"""

from pathlib import Path

from configs import nano

OVERRIDES = {
    "data.train_per_policy": 12,
    "data.cot_per_policy": 6,
    "data.test": 6,
    "eval.examples": 6,
    "eval.rows": 4,
    "max_new_tokens": 8,
    "row_buckets": (192,),
    "prompt_buckets": (104,),
    "save_every": 1,
    "vm_cpt.epochs": 1,
    "vm_cpt.batch": 4,
    "cot_sft.epochs": 1,
    "cot_sft.batch": 4,
    "rl.steps": 8,
    "rl.prompts": 8,
    "rl.update_prompts": 4,
    "rl.group_size": 1,
    "rl.log_rollouts_every": 1,
}


def get_config(argument: str):
    folder, method = argument.split(",")
    config = nano.get_config(f"method={method}")
    there = {key: value for key, value in OVERRIDES.items() if key.split(".")[0] in config}
    config.update_from_flattened_dict(there)
    # rewards differ by length: a model that knows nothing has groups with a spread
    config.rl.overlong_tokens = 7
    if "dapo" in method:
        config.rl.max_attempts = 3
    if method == "base_grpo":
        config.rl.steps, config.rl.group_size = 4, 2
    config.model_dir, config.data_dir = str(Path(folder) / "base"), str(Path(folder) / "data")
    return config
