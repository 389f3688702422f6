"""The rows of the table: which stages a method runs, in order, and with what RL.

    the paper's        prompt only, SFT, SFT and RL, TriMPI without and with PolicyRollout
    asked of it since  RL without CoT SFT, RL on the questions that have a chain of thought only,
                       distillation of the actor that reads the policy

Source: paper section 6. What each trains on: docs/methods.md.
"""

import difflib

from ml_collections import ConfigDict

METHODS: dict[str, tuple[str, ...]] = {
    "in_context": (),
    "direct_sft": ("direct_sft",),
    "cot_sft": ("cot_sft",),
    "vm_cpt_cot_sft": ("vm_cpt", "cot_sft"),
    "cot_sft_grpo": ("cot_sft", "rl"),
    "cot_sft_dapo": ("cot_sft", "rl"),
    "trimpi_grpo": ("vm_cpt", "cot_sft", "rl"),
    "trimpi_dapo": ("vm_cpt", "cot_sft", "rl"),
    "trimpi_poro_grpo": ("vm_cpt", "cot_sft", "rl"),
    "trimpi_poro_dapo": ("vm_cpt", "cot_sft", "rl"),
    "base_grpo": ("rl",),
    "base_poro_grpo": ("rl",),
    "vm_cpt_grpo": ("vm_cpt", "rl"),
    "vm_cpt_poro_grpo": ("vm_cpt", "rl"),
    "cot_sft_grpo_on_cot": ("cot_sft", "rl"),
    "trimpi_poro_grpo_on_cot": ("vm_cpt", "cot_sft", "rl"),
    "distillation": ("distillation",),
    "trimpi_distillation": ("vm_cpt", "cot_sft", "distillation"),
}
POLICY_ROLLOUT = frozenset(method for method in METHODS if "_poro_" in method)
DAPO = frozenset({"cot_sft_dapo", "trimpi_dapo", "trimpi_poro_dapo"})
COT_QUESTIONS = frozenset({"cot_sft_grpo_on_cot", "trimpi_poro_grpo_on_cot"})  # of RL

TITLES: dict[str, str] = {
    "in_context": "in context, no training",
    "direct_sft": "Direct SFT",
    "cot_sft": "CoT SFT",
    "vm_cpt_cot_sft": "VM-CPT + CoT SFT",
    "cot_sft_grpo": "CoT SFT + GRPO",
    "cot_sft_dapo": "CoT SFT + DAPO",
    "trimpi_grpo": "TriMPI GRPO",
    "trimpi_dapo": "TriMPI DAPO",
    "trimpi_poro_grpo": "TriMPI PoRo-GRPO",
    "trimpi_poro_dapo": "TriMPI PoRo-DAPO",
    "base_grpo": "GRPO from the base",
    "base_poro_grpo": "PoRo-GRPO from the base",
    "vm_cpt_grpo": "VM-CPT + GRPO",
    "vm_cpt_poro_grpo": "VM-CPT + PoRo-GRPO",
    "cot_sft_grpo_on_cot": "CoT SFT + GRPO, CoT questions only",
    "trimpi_poro_grpo_on_cot": "TriMPI PoRo-GRPO, CoT questions only",
    "distillation": "distillation from the base",
    "trimpi_distillation": "VM-CPT + CoT SFT + distillation",
}


def rl_rollouts(section: ConfigDict) -> int:
    """Completions that an RL stage samples, without the further prompts of dynamic sampling."""
    return section.steps * section.prompts * 2 * section.group_size


def parse_method(argument: str | None) -> str:
    """The method named by a config argument such as "method=trimpi_grpo".

    Raises:
        ValueError: another argument, or an unknown method (with the closest match).
    """
    if not argument:
        return "trimpi_poro_grpo"
    key, _, name = argument.partition("=")
    if key != "method" or not name:
        raise ValueError(f"the config argument is method=NAME, got '{argument}'")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown method '{name}'{hint} Methods: {sorted(METHODS)}")
    return name
