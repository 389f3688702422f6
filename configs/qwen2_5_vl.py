"""The paper's experiments on Qwen2.5-VL, from a Hugging Face folder of the released weights.

    python -m trimpi_jax.train --workdir /some/folder \\
        --config configs/qwen2_5_vl.py:size=7b,task=clevr_t6,method=trimpi_poro_grpo \\
        --config.model_dir=/path/to/Qwen2.5-VL-7B-Instruct

    size    3b (default), 7b, 32b, 72b            the folder's config.json is checked against it
    task    clevr_t2, clevr_t4, clevr_t6 (default), clevr_m2, clevr_m4, clevr_m6, gta, own
    method  a row of configs/methods.py           trimpi_poro_grpo by default

`task=own` needs --config.data.source=/folder/of/the/policy (docs/own_policy.md). Numbers marked
"paper" are those of arXiv:2510.09474, section 4; "ours" marks what it leaves open. The paper trains
3b and 7b; 32b and 72b take the same numbers. What this file does not name is as in configs/nano.py.

A device works on one row at a time, on any number of devices. 7b fits eight cards of 80 GB and a
v5p-8 as it stands here; 3b on one 80 GB card needs moments of half the width (the compiler's bytes
in docs/preflight.md; `python -m trimpi_jax.preflight` says whether a run fits, before it starts):

    --config.vm_cpt.moment_dtype=bfloat16 --config.rl.moment_dtype=bfloat16
"""

import difflib
import math

from ml_collections import ConfigDict

from configs import nano
from configs.evaluation import make_eval
from configs.methods import parse_method
from trimpi_jax.models.releases import parse_size

CLEVR_VISUAL_TOKENS = 11 * 17  # 480x320 px (CLEVR) resized to 476x308, cells of 28 px
CLEVR_WINDOWS = 3 * 5  # 4x4 cells each
FREE_TOKENS = CLEVR_VISUAL_TOKENS + 81  # with the template and the query of 37 tokens, measured
# policy documents of the built-in ClevrPolicy-T in Qwen2.5 tokens, measured: 125, 584, 2396
POLICY_TOKENS = {2: 160, 4: 640, 6: 2560}
# chains of thought, longest of 360 in Qwen2.5 tokens, measured: 118, 190, 260; RL may ramble
MAX_NEW_TOKENS = {2: 192, 4: 256, 6: 384}
CROPS = {2: 2, 4: 8, 6: 27}  # in a document of variant M: half of its conditions show a picture
COT_EXAMPLES = {"t": 2526, "m4": 2282, "m6": 2472, "m2": 2500}  # paper, except m2 (about 2.5K)

TASKS = (*(f"clevr_{variant}{depth}" for variant in "tm" for depth in (2, 4, 6)), "gta", "own")


def get_config(argument: str | None = None) -> ConfigDict:
    size, task, method = parse_argument(argument)
    config = nano.get_config(f"method={method}")
    config.name = f"qwen2_5_vl_{size}-{task}-{method}"
    config.size = size
    config.model_dir = ""  # a folder of the released weights; there is no default
    config.dtype = "bfloat16"  # of activations; weights and moments are float32
    config.layer_loop = "scan"  # one compiled layer
    config.remat = "full"  # keep the layers' inputs only; `trimpi_jax.preflight` says what fits
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})  # paper: 8 GPUs, ZeRO-like
    config.data_dir = ""  # a dataset built with just these settings, e.g. by make_cot; "" = build
    config.save_every = 20
    config.log_every = 1
    config.min_pixels = 0  # 0 = as the model's preprocessor_config.json says
    config.max_pixels = 0
    TASK_SETTERS[task.rstrip("0123456789")](config, task)
    set_training(config, gta=task == "gta")
    return config


def parse_argument(argument: str | None) -> tuple[str, str, str]:
    """(size, task, method) of "size=7b,task=gta,method=cot_sft"; each part may be left out.

    Raises:
        ValueError: an unknown key or value (with the closest match), or a key twice.
    """
    values = {"size": "3b", "task": "clevr_t6", "method": "trimpi_poro_grpo"}
    seen = set()
    for part in filter(None, (argument or "").split(",")):
        key, _, value = part.partition("=")
        if key not in values or not value or key in seen:
            raise ValueError(
                f"the config argument is size=...,task=...,method=..., each once; got '{argument}'"
            )
        seen.add(key)
        values[key] = value
    if values["task"] not in TASKS:
        close = difflib.get_close_matches(values["task"], TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown task '{values['task']}'{hint} Tasks: {list(TASKS)}")
    return parse_size(values["size"]), values["task"], parse_method(f"method={values['method']}")


def set_clevr(config: ConfigDict, task: str) -> None:
    """ClevrPolicy: 10 policies, 2,000 training images each, 2,000 unseen test images (paper)."""
    variant, depth = task[-2], int(task[-1])
    config.data = data = ConfigDict()
    data.dataset = "clevr_policy"
    if variant == "m":
        data.variant = "M"
    data.depth = depth  # paper: N
    data.policies = 10  # paper
    data.train_per_policy = 2000  # paper: 20K non-CoT pairs
    data.cot_per_policy = math.ceil(COT_EXAMPLES["t" if variant == "t" else f"m{depth}"] / 10)
    data.test = 2000  # paper
    data.width, data.height = 480, 320  # CLEVR_v1.0
    data.min_objects, data.max_objects = 3, 10  # CLEVR_v1.0
    data.seed = 0
    data.clevr_dir = ""  # a folder of CLEVR_v1.0 to use its images, as the paper does

    crops = CROPS[depth] if variant == "m" else 0
    policy = POLICY_TOKENS[depth] + 6 * crops  # a crop of 2x2 visual tokens between its two marks
    longest = MAX_NEW_TOKENS[depth]
    del config["windows"]  # one number there, buckets here
    config.windows = (CLEVR_WINDOWS, CLEVR_WINDOWS + crops) if crops else (CLEVR_WINDOWS,)
    config.max_new_tokens = longest
    config.prompt_buckets = round_up(FREE_TOKENS, FREE_TOKENS + policy)
    config.row_buckets = round_up(FREE_TOKENS + longest, FREE_TOKENS + policy + longest)
    config.eval = make_eval(examples=2000, rows=128)


def set_gta(config: ConfigDict, task: str) -> None:
    """GTAPolicy: 451 training and 106 test instances of one tool call (paper)."""
    config.data = data = ConfigDict()
    data.dataset = "gta_policy"
    data.source = "synthetic"  # or "official", the GTA release in gta_dir, as the paper
    data.gta_dir = ""
    data.train, data.test = 451, 106  # paper
    data.seed = 0
    data.text_encoder = "all-MiniLM-L6-v2-int8"  # ours: not stated; or a Hugging Face folder
    data.text_layer = 0  # the last; bert_score takes 17 for roberta-large
    data.text_baseline = 0.0
    config.max_pixels = 512 * 28 * 28  # ours: at most 512 visual tokens an image
    set_auto_sizes(config)
    config.eval = make_eval(examples=106, rows=64)


def set_own(config: ConfigDict, task: str) -> None:
    """A user's own policy folder."""
    config.data = ConfigDict({"dataset": "own", "source": ""})
    config.max_pixels = 512 * 28 * 28
    set_auto_sizes(config)
    config.eval = make_eval(examples=500, rows=64)  # fewer than that: all there are


def set_auto_sizes(config: ConfigDict) -> None:
    """Buckets, windows and completion length from the data, as in configs/own_policy.py."""
    for key in ("windows", "prompt_buckets", "row_buckets", "max_new_tokens"):
        del config[key]
        config[key] = "auto"


TASK_SETTERS = {"clevr_t": set_clevr, "clevr_m": set_clevr, "gta": set_gta, "own": set_own}


def set_training(config: ConfigDict, *, gta: bool) -> None:
    """The paper's hyper-parameters, stage by stage; batches are per GPU x GPUs there."""
    rl_steps = 50 if gta else 104  # paper: rollout steps
    rl_prompts = 256 if gta else 384  # paper: rollout batch
    for stage in config.stages:
        section = config[stage]
        section.schedule = "constant"  # ours: not stated
        section.warmup_steps = 0  # ours: not stated
        section.weight_decay = 0.0  # ours: not stated
        section.clip_norm = 1.0  # ours: not stated
    if "vm_cpt" in config:
        config.vm_cpt.learning_rate = 1e-5  # paper
        config.vm_cpt.epochs = 5  # paper
        config.vm_cpt.batch = 8 * 8 if gta else 16 * 8  # paper
        config.vm_cpt.trainable = "all"  # paper: no LoRA
        config.vm_cpt.micro_batches = 0  # ours: one row a device at a time
    for stage, epochs in (("direct_sft", 2), ("cot_sft", 5)):  # paper: Clevr
        if stage in config:
            section = config[stage]
            section.learning_rate = 1e-4  # paper
            section.epochs = 10 if gta else epochs  # paper
            section.batch = 8 * 4 if gta else 16 * 4  # paper
            section.trainable = "lora"  # paper
            section.lora_rank = 8  # paper
            section.lora_alpha = 16  # ours: twice the rank; not stated
            section.micro_batches = 0
    if "rl" in config:
        section = config.rl
        section.learning_rate = 1e-6  # paper
        section.steps = rl_steps
        section.prompts = rl_prompts
        section.update_prompts = 4 * 8  # paper: update batch
        section.sample_prompts = 32  # ours: 32 x 16 completions in the KV cache at a time
        section.group_size = 8  # ours: G is not stated
        section.temperature = 1.0  # ours: not stated; what importance ratios assume
        section.top_p = 1.0
        if "policy_chunk" in section:  # ours: GTA has one policy, ClevrPolicy ten
            section.policy_chunk = 64 if gta else 16
        section.compact_every = 128  # ours: decode steps
        if "overlong_tokens" in section and isinstance(config.max_new_tokens, int):
            section.overlong_tokens = config.max_new_tokens // 5  # DAPO: 4,096 of 20,480
        section.clip_low = 0.2  # paper
        if "dapo" not in config.method:  # configs/methods.py has DAPO's 0.28 and no KL
            section.clip_high = 0.3  # paper
            section.kl_beta = 0.01  # paper
        section.trainable = "all"  # paper: no LoRA
        section.micro_batches = 0  # ours: one group a device at a time
        section.log_rollouts_every = 1
    if "distillation" in config:  # ours: the paper has no such row
        section = config.distillation
        section.learning_rate = 1e-5  # as VM-CPT: all weights, supervised
        section.rollouts = rl_steps * rl_prompts * 16  # as many completions as RL samples
        section.sample_prompts = 32
        section.compact_every = 128
        section.epochs = 2  # as the paper's RL
        section.batch = 64 if gta else 128
        section.micro_batches = 0


def round_up(*tokens: int) -> tuple[int, ...]:
    """Buckets that hold these many tokens, multiples of 128 (what TPU kernels cut in)."""
    return tuple(128 * math.ceil(count / 128) for count in tokens)
