"""The rows of the paper's main table: which stages a method runs, in order.

Source: paper section 6.
"""

import difflib

METHODS: dict[str, tuple[str, ...]] = {
    "in_context": (),
    "direct_sft": ("direct_sft",),
    "cot_sft": ("cot_sft",),
    "vm_cpt_cot_sft": ("vm_cpt", "cot_sft"),
    "cot_sft_grpo": ("cot_sft", "rl"),
    "trimpi_grpo": ("vm_cpt", "cot_sft", "rl"),
    "cot_sft_dapo": ("cot_sft", "rl"),
    "trimpi_dapo": ("vm_cpt", "cot_sft", "rl"),
    "trimpi_poro_grpo": ("vm_cpt", "cot_sft", "rl"),
    "trimpi_poro_dapo": ("vm_cpt", "cot_sft", "rl"),
}
POLICY_ROLLOUT = frozenset({"trimpi_poro_grpo", "trimpi_poro_dapo"})
DAPO = frozenset({"cot_sft_dapo", "trimpi_dapo", "trimpi_poro_dapo"})


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
