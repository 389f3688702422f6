"""Internalize two ClevrPolicy-T policies of depth 2 into the nano model, on a laptop CPU.

    python -m trimpi_jax.train --config configs/nano.py --workdir /some/folder
    python -m trimpi_jax.train --config configs/nano.py:method=cot_sft --workdir /other/folder
    python -m trimpi_jax.train --config configs/nano.py --config.rl.group_size=4

A section exists only when its stage runs, so an override that would do nothing is an error.
"""

from ml_collections import ConfigDict

from configs.evaluation import make_eval
from configs.methods import (
    COT_QUESTIONS,
    DAPO,
    METHODS,
    POLICY_ROLLOUT,
    parse_method,
    rl_rollouts,
)


def get_config(argument: str | None = None) -> ConfigDict:
    method = parse_method(argument)
    config = ConfigDict()
    config.name = f"nano-{method}"
    config.kind = "internalize"
    config.method = method
    config.stages = METHODS[method]
    config.seed = 0
    config.model_dir = "assets/nano"  # beside the package, or any Hugging Face folder
    config.dtype = "float32"
    config.remat = "none"  # or "full", "attention", "dots": less memory, more time
    config.attention = "auto"  # the kernel of the platform; or "xla", "cudnn", "splash"
    config.layer_loop = "unrolled"  # faster than "scan" for a tiny model
    config.windows = 6  # vision windows a row: 168x112 px in windows of 56x56
    config.prompt_buckets = (56, 104)  # tokens: policy-free, policy-aware
    config.row_buckets = (144, 192)  # tokens of prompt + completion
    config.max_new_tokens = 92
    config.save_every = 25
    config.keep_last = 2  # newest checkpoints that stay
    config.checkpoint_dir = ""  # "" = in the workdir; or a folder, or gs://bucket/run
    config.log_every = 10
    config.data_workers = 0  # processes that decode and encode ahead of the step; 0 = a thread
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.data_dir = ""  # a dataset built with just these settings, e.g. by make_cot; "" = build
    config.data = ConfigDict(
        {
            "dataset": "clevr_policy",
            "variant": "T",
            "depth": 2,
            "policies": 2,
            "train_per_policy": 400,
            "cot_per_policy": 120,
            "test": 300,
            "validation": 0,
            "override": 0,
            "cogent_b": 0,
            "more_objects": 0,
            "deeper": 0,
            "shown_share": 0.5,
            "crop_px": 56,
            "crops": "rendered",
            "width": 168,
            "height": 112,
            "min_objects": 3,
            "max_objects": 5,
            "supersample": 2,
            "seed": 0,
            "clevr_dir": "",
        }
    )
    config.eval = make_eval(examples=300, rows=100, nano=200, new_tokens=96)

    sections = {
        "vm_cpt": make_vm_cpt,
        "direct_sft": make_direct_sft,
        "cot_sft": make_cot_sft,
        "rl": lambda: make_rl(
            policy_rollout=method in POLICY_ROLLOUT,
            objective="dapo" if method in DAPO else "grpo",
            data="cot" if method in COT_QUESTIONS else "all",
        ),
        "distillation": make_distillation,
    }
    for stage in config.stages:
        config[stage] = sections[stage]()
    return config


def make_optimizer_section(learning_rate: float, warmup_steps: int) -> ConfigDict:
    section = ConfigDict()
    section.learning_rate = learning_rate
    section.warmup_steps = warmup_steps
    section.schedule = "constant"
    section.weight_decay = 0.0
    section.clip_norm = 1.0
    section.moment_dtype = "float32"  # or "bfloat16": half the optimizer's memory
    section.micro_batches = 1  # 0 = as many as it takes for one row a device at a time
    section.keep_best = 0  # checkpoints that stay beside the newest, by
    section.best_metric = ""  # "highest evaluation/main_accuracy", "lowest train/loss", ...
    section.result = "last"  # the checkpoint that the stage hands on; or "best"
    return section


def make_vm_cpt() -> ConfigDict:
    section = make_optimizer_section(1e-4, 5)  # paper: 1e-5 for 7B; a 2M model needs more
    section.epochs = 5  # paper
    section.batch = 8
    section.trainable = "all"  # paper: no LoRA
    section.pack_tokens = 0  # tokens of a row that several examples share; 0 = a row is one example
    section.pack_windows = 0  # vision windows of such a row
    return section


def make_direct_sft() -> ConfigDict:
    section = make_optimizer_section(1e-3, 5)  # paper: 1e-4 for 7B
    section.epochs = 2  # paper
    section.batch = 8
    section.trainable = "lora"
    section.lora_rank = 8  # paper
    section.lora_alpha = 16
    section.pack_tokens = 0
    section.pack_windows = 0
    return section


def make_cot_sft() -> ConfigDict:
    section = make_direct_sft()
    section.epochs = 5  # paper
    return section


def make_rl(*, policy_rollout: bool, objective: str, data: str = "all") -> ConfigDict:
    section = make_optimizer_section(3e-5, 5)  # paper: 1e-6 for 7B; 1e-4 is too hot, docs/rl.md
    section.schedule = "cosine"
    section.data = data  # "all" training questions, or "cot": those with a chain of thought only
    section.steps = 100  # paper: 104
    section.objective = objective
    section.prompts = 8
    section.update_prompts = 8
    section.max_rollouts = 0  # the stage ends when so many have been sampled; 0 = no limit
    section.sample_prompts = 0  # sampled at a time, what the KV cache has room for; 0 = all
    section.group_size = 8  # G; a joint group has 2G rollouts, without PoRo all 2G are free
    section.policy_rollout = policy_rollout
    section.temperature = 1.0
    section.top_k = 0  # 0 = all
    section.top_p = 1.0
    section.compact_every = 0  # decode steps between compactions of finished rows; 0 = never
    if policy_rollout:
        section.policy_chunk = 1  # prompts that share one copy of a policy while decoding
    section.clip_low = 0.2  # paper
    section.clip_high = 0.3 if objective == "grpo" else 0.28  # paper
    if objective == "grpo":
        section.kl_beta = 0.01  # paper; DAPO has no KL
    else:
        section.max_attempts = 20  # paper: batches of prompts a step may draw
        section.stop_after_dry_steps = 3  # steps in a row that ran out of attempts
        section.overlong_tokens = 16  # soft overlong ramp, DAPO
    section.importance_cap = 0.0  # truncated importance weighting; 0 = off
    section.max_failed_grades = 0.05  # share of completions whose grading may fail
    section.accuracy_weight = 0.9
    section.format_weight = 0.1
    section.trainable = "all"  # paper: no LoRA
    section.log_rollouts_every = 20
    return section


def make_distillation() -> ConfigDict:
    section = make_optimizer_section(1e-4, 5)  # as VM-CPT, which also trains all weights
    section.data = "all"  # the questions: "all" of training, or "cot", as in `rl`
    # completions sampled in all: by default as many as an RL row samples
    section.rollouts = rl_rollouts(make_rl(policy_rollout=True, objective="grpo"))
    section.samples = 16  # of a question and round, as a joint group of RL has
    section.sample_prompts = 8  # questions sampled at a time, what the KV cache has room for
    section.temperature = 1.0
    section.top_k = 0  # 0 = all
    section.top_p = 1.0
    section.compact_every = 0  # decode steps between compactions of finished rows; 0 = never
    section.min_accuracy = 1.0  # lowest accuracy that is kept; below 1 for graded scores only
    section.kept_per_question = 4  # most right answers to a question; 0 = all
    section.max_failed_grades = 0.05  # share of completions whose grading may fail
    section.epochs = 4  # at most as many rows as an RL row trains on: 4 x 4 of 16 samples
    section.batch = 8
    section.trainable = "all"
    section.pack_tokens = 0
    section.pack_windows = 0
    return section
