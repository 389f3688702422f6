"""The paper's results, to stand beside ours where task and depth are the same.

Other models (Qwen2.5-VL 3B and 7B), other policies, 2,000 test questions: context, not a target.

Source: arXiv:2510.09474, the main tables; accuracy in %, GTA: overall score.
Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

from typing import Any

IN_CONTEXT = "in context, no training"

# (dataset, variant, depth) -> method -> {model: %}
FIGURES: dict[tuple[str, str, int], dict[str, dict[str, float]]] = {
    ("clevr_policy", "T", 2): {
        IN_CONTEXT: {"3B": 36.60, "7B": 72.00, "Claude 4 Sonnet": 98.10},
    },
    ("clevr_policy", "T", 4): {
        IN_CONTEXT: {"3B": 10.85, "7B": 32.20, "Claude 4 Sonnet": 96.70},
        "cot_sft": {"7B": 49.10},
        "cot_sft_grpo": {"7B": 98.25},
        "trimpi_poro_grpo": {"7B": 99.15},
    },
    ("clevr_policy", "M", 4): {
        "cot_sft": {"7B": 55.35},
        "cot_sft_grpo": {"7B": 87.10},
        "trimpi_poro_grpo": {"7B": 99.05},
    },
    ("clevr_policy", "T", 6): {
        IN_CONTEXT: {"3B": 4.80, "7B": 13.15, "Claude 4 Sonnet": 90.10},
        "direct_sft": {"7B": 15.15},
        "cot_sft": {"3B": 19.00, "7B": 17.80},
        "vm_cpt_cot_sft": {"7B": 22.75},
        "cot_sft_grpo": {"3B": 31.55, "7B": 47.05},
        "cot_sft_grpo_on_cot": {"7B": 34.10},
        "cot_sft_dapo": {"7B": 67.60},
        "trimpi_grpo": {"7B": 55.90},
        "trimpi_poro_grpo": {"3B": 46.65, "7B": 65.85},
        "trimpi_poro_dapo": {"3B": 68.75, "7B": 77.80},
    },
    ("clevr_policy", "M", 6): {
        IN_CONTEXT: {"7B": 5.65},
        "direct_sft": {"7B": 14.55},
        "cot_sft": {"3B": 9.25, "7B": 14.30},
        "vm_cpt_cot_sft": {"7B": 27.05},
        "cot_sft_grpo": {"3B": 22.40, "7B": 64.50},
        "cot_sft_dapo": {"7B": 74.40},
        "trimpi_grpo": {"7B": 80.80},
        "trimpi_poro_grpo": {"3B": 78.80, "7B": 84.70},
        "trimpi_poro_dapo": {"3B": 82.35, "7B": 85.00},
    },
    ("gta_policy", "", 0): {
        IN_CONTEXT: {"7B": 21.51},
        "direct_sft": {"7B": 40.75},
        "cot_sft": {"7B": 54.50},
        "vm_cpt_cot_sft": {"7B": 65.47},
        "cot_sft_dapo": {"7B": 72.43},
        "trimpi_grpo": {"7B": 79.33},
        "trimpi_poro_grpo": {"7B": 81.06},
        "trimpi_poro_dapo": {"7B": 76.01},
    },
}

# suite -> task -> method -> figure of the 7B model: accuracy in % (GTA: overall score), referral
# 0 to 10, the branching error as a mean absolute difference over 2,000 answers
_T6, _M6, _GTA = ("clevr_policy", "T", 6), ("clevr_policy", "M", 6), ("gta_policy", "", 0)
SUITE_FIGURES: dict[str, dict[tuple[str, str, int], dict[str, float]]] = {
    "override": {
        _T6: {"cot_sft": 16.40, "trimpi_poro_grpo": 48.70, "trimpi_poro_dapo": 59.40},
        _M6: {"cot_sft": 25.20, "trimpi_poro_grpo": 82.70, "trimpi_poro_dapo": 85.15},
        _GTA: {"cot_sft": 38.71, "trimpi_poro_grpo": 63.00, "trimpi_poro_dapo": 58.94},
    },
    "referral": {
        _T6: {"cot_sft": 3.54, "trimpi_poro_grpo": 5.60},
        _M6: {"cot_sft": 3.44, "trimpi_poro_grpo": 8.72},
        _GTA: {"cot_sft": 7.68, "trimpi_poro_grpo": 9.45},
    },
    "branching": {_T6: {"cot_sft": 39.74, "cot_sft_grpo": 38.72, "trimpi_poro_grpo": 7.07}},
}
SAVED = {"prompt_tokens": 93.9, "prefill_ms": 85.7}  # %, "up to"


def task_of(config: dict[str, Any]) -> tuple[str, str, int]:
    """The key of FIGURES that a run's config has."""
    data = config.get("data", {})
    if data.get("dataset") == "gta_policy":
        return "gta_policy", "", 0
    return str(data.get("dataset", "")), str(data.get("variant", "T")), int(data.get("depth", 0))


def method_of(stages: tuple[str, ...], rl: dict[str, Any]) -> str:
    """The paper's method of a model that went through `stages`; "" = it has none."""
    name = {
        (): IN_CONTEXT,
        ("direct_sft",): "direct_sft",
        ("cot_sft",): "cot_sft",
        ("vm_cpt", "cot_sft"): "vm_cpt_cot_sft",
        ("cot_sft", "rl"): "cot_sft",
        ("vm_cpt", "cot_sft", "rl"): "trimpi",
    }.get(stages, "")
    if "rl" not in stages or not name:
        return name
    if rl.get("policy_rollout"):
        name += "_poro"
    name += f"_{rl.get('objective', 'grpo')}"
    return f"{name}_on_cot" if rl.get("data") == "cot" else name
