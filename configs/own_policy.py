"""Internalize your own policy: a folder with policy.md, examples.jsonl and task.toml.

    python -m examples.returns_desk.make --out runs/returns_desk
    python -m trimpi_jax.train --config configs/own_policy.py --workdir runs/own \
        --config.data.source=runs/returns_desk

The folder is checked first, and everything that is wrong with it is listed. Sizes that are "auto"
are chosen from the data; write numbers instead to choose them yourself
(`--config.row_buckets=320,4096`). The method is chosen as in configs/nano.py
(`configs/own_policy.py:method=cot_sft`). See docs/own_policy.md.
"""

from ml_collections import ConfigDict

from configs import nano
from configs.evaluation import make_eval


def get_config(argument: str | None = None) -> ConfigDict:
    config = nano.get_config(argument)
    config.name = f"own_policy-{config.method}"
    config.data = ConfigDict({"dataset": "own", "source": ""})
    # texts, so that both "auto" and numbers can be given on the command line
    for key in ("windows", "prompt_buckets", "row_buckets", "max_new_tokens"):
        del config[key]
        config[key] = "auto"
    config.remat = "attention"  # a document's attention is recomputed, not kept: T x T of each head
    config.eval = make_eval(examples=200, rows=8)  # fewer examples: all there are
    for stage in config.stages:
        STAGES[stage](config[stage])
    return config


def set_vm_cpt(section: ConfigDict) -> None:
    section.batch = 2  # rows of a whole document: thousands of tokens each
    section.micro_batches = 2  # one of them in memory at a time
    del section.epochs
    section.epochs = 2.0  # a part of an epoch is enough for a long document and many examples


def set_sft(section: ConfigDict) -> None:
    section.epochs = 10  # a few hundred examples, as GTA's 451 in the paper
    # The nano base has never seen most words of your document: its embeddings must learn them, and
    # LoRA leaves those as they are. For a large base model: trainable=lora,
    # learning_rate=1e-4 (paper).
    section.trainable = "all"
    section.learning_rate = 5e-4


def set_rl(section: ConfigDict) -> None:
    section.steps = 50  # paper, for a few hundred examples
    section.prompts = 4
    section.update_prompts = 4
    if "policy_chunk" in section:
        section.policy_chunk = 4  # there is one policy: all prompts of a step share it


def set_distillation(section: ConfigDict) -> None:
    section.learning_rate = 5e-4  # as SFT
    section.rollouts = 50 * 4 * 16  # as RL: steps, prompts, completions of a prompt
    section.sample_prompts = 4


STAGES = {
    "vm_cpt": set_vm_cpt,
    "direct_sft": set_sft,
    "cot_sft": set_sft,
    "rl": set_rl,
    "distillation": set_distillation,
}
