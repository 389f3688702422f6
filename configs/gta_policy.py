"""GTAPolicy on the nano model: every step of the paper's third task, on a laptop CPU.

    python -m trimpi_jax.train --config configs/gta_policy.py --workdir runs/gta
    python -m trimpi_jax.train --config configs/gta_policy.py --workdir runs/gta \
        --config.data.source=official --config.data.gta_dir=/path/to/gta_dataset

The task is the real one; the model is not up to it: two million parameters that never saw a tool
call, on images of 112x112 pixels. Use this file to try the task out, and
configs/qwen2_5_vl.py:task=gta to train on it. The method is chosen as in configs/nano.py
(`configs/gta_policy.py:method=cot_sft`). See docs/data_gta_policy.md.
"""

from ml_collections import ConfigDict

from configs import own_policy
from configs.evaluation import make_eval


def get_config(argument: str | None = None) -> ConfigDict:
    config = own_policy.get_config(argument)  # another low-data task with a long document
    config.name = f"gta_policy-{config.method}"
    config.data = ConfigDict(
        {
            "dataset": "gta_policy",
            "source": "synthetic",  # or "official", the GTA release
            "gta_dir": "",
            "train": 451,  # paper
            "test": 106,  # paper
            "seed": 0,
            "text_encoder": "all-MiniLM-L6-v2-int8",  # or a Hugging Face folder
            "text_layer": 0,
            "text_baseline": 0.0,
        }
    )
    config.min_pixels = 0
    config.max_pixels = 112 * 112  # ours: four windows of the nano model an image
    config.eval = make_eval(examples=106, rows=16)
    return config
