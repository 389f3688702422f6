"""The paper's tables in the small: every row, several seeds, equal budgets, on the nano model.

    python -m trimpi_jax.sweep --sweep configs/sweeps/paper_tables.py:small --workdir runs/tables

    small    ClevrPolicy-T at depth 2, seeds 0 to 2: hours on two cores (docs/sweeps.md)
    medium   -M at depth 2 and -T at depth 4 as well: half a day on two cores
    full     ClevrPolicy-T and -M at depth 2, 4 and 6, and GTAPolicy synthetic: for a GPU
    split=validation    other questions than the test set's, to tune on: `small,split=validation`
    seeds=5             seeds 0 to 4

A seed is another draw of everything: policies, pictures, order, samples. Numbers are those of
configs/nano.py and configs/gta_policy.py where nothing else is said here.
"""

import difflib
import functools

from ml_collections import ConfigDict

from configs import gta_policy, nano
from configs.methods import TITLES
from trimpi_jax.io.paper_figures import IN_CONTEXT
from trimpi_jax.sweeps.plan import AWARE, CHANGED, FREE, Claim, Column, Row, Sweep

SCALES = {
    "small": ("T2",),
    "medium": ("T2", "M2", "T4"),
    "full": ("T2", "T4", "T6", "M2", "M4", "M6", "GTA"),
}
QUESTIONS = 300
SUITES = ("main", "in_context", "override", "anatomy", "referral", "forgetting")
GTA_SUITES = ("main", "in_context", "override", "referral")
# the requests a second of "efficiency" cost minutes a stage
MORE_SUITES = {"small": (), "medium": (), "full": ("efficiency",)}

PAPER_ROWS = (
    *("direct_sft", "cot_sft", "vm_cpt_cot_sft", "cot_sft_grpo", "cot_sft_dapo", "trimpi_grpo"),
    *("trimpi_dapo", "trimpi_poro_grpo", "trimpi_poro_dapo"),
)
ASKED_ROWS = (  # by readers of the paper: RL without CoT SFT, RL on fewer questions, distillation
    *("base_grpo", "vm_cpt_poro_grpo", "cot_sft_grpo_on_cot"),
    *("distillation", "trimpi_distillation"),
)
ROWS = (
    Row("in_context", TITLES["in_context"], "in_context", shows=AWARE, paper=IN_CONTEXT),
    *(Row(name, TITLES[name], name, paper=name) for name in (*PAPER_ROWS, *ASKED_ROWS)),
)

CLAIMS = (
    Claim("poro", "PoRo beats plain GRPO at equal budget", "trimpi_poro_grpo", "trimpi_grpo"),
    Claim("poro_dapo", "PoRo beats plain DAPO at equal budget", "trimpi_poro_dapo", "trimpi_dapo"),
    Claim("cpt_sft", "VM-CPT helps before SFT", "vm_cpt_cot_sft", "cot_sft"),
    Claim("cpt_grpo", "VM-CPT helps before SFT and GRPO", "trimpi_grpo", "cot_sft_grpo"),
    Claim("cpt_dapo", "VM-CPT helps before SFT and DAPO", "trimpi_dapo", "cot_sft_dapo"),
    Claim("cot", "Chains of thought help SFT", "cot_sft", "direct_sft"),
    Claim("rl", "RL improves on SFT", "cot_sft_grpo", "cot_sft"),
    Claim("rl_cpt", "RL improves on VM-CPT + SFT", "trimpi_grpo", "vm_cpt_cot_sft"),
    Claim("dapo", "DAPO beats GRPO", "cot_sft_dapo", "cot_sft_grpo"),
    Claim("dapo_poro", "With PoRo, too, DAPO beats GRPO", "trimpi_poro_dapo", "trimpi_poro_grpo"),
    Claim(
        "beats_prompt",
        "TriMPI without the policy beats the base that reads it",
        "trimpi_poro_grpo",
        "in_context",
        FREE,
        AWARE,
    ),
    Claim(
        "keeps_in_context",
        "PoRo keeps following a policy in context (loses less than 5 points)",
        "trimpi_poro_grpo",
        "in_context",
        AWARE,
        more_than=-5.0,
    ),
    Claim(
        "in_context",
        "PoRo follows a policy in context better than plain GRPO",
        "trimpi_poro_grpo",
        "trimpi_grpo",
        AWARE,
    ),
    Claim(
        "override",
        "PoRo follows a changed policy better than plain GRPO",
        "trimpi_poro_grpo",
        "trimpi_grpo",
        CHANGED,
    ),
    Claim(
        "override_sft",
        "PoRo follows a changed policy better than CoT SFT",
        "trimpi_poro_grpo",
        "cot_sft",
        CHANGED,
    ),
    Claim(
        "all_questions",
        "RL on all questions beats RL on those with a chain of thought",
        "cot_sft_grpo",
        "cot_sft_grpo_on_cot",
    ),
    Claim(
        "cold_start",
        "CoT SFT is needed before RL with PoRo",
        "trimpi_poro_grpo",
        "vm_cpt_poro_grpo",
    ),
    Claim(
        "distilled",
        "PoRo beats distilling the actor that reads the policy",
        "trimpi_poro_grpo",
        "trimpi_distillation",
    ),
    Claim(
        "growth",
        "The gain of PoRo over GRPO grows with depth",
        "trimpi_poro_grpo",
        "trimpi_grpo",
        grows=True,
    ),
    *(
        Claim(
            f"{row}_{column}",
            f"{label} at depth 6 reaches {least} % without the policy",
            row,
            more_than=least,
            columns=(column,),
        )
        for column, least in (("T6", 85.0), ("M6", 90.0))
        for row, label in (("trimpi_poro_grpo", "PoRo-GRPO"), ("trimpi_poro_dapo", "PoRo-DAPO"))
    ),
)

# measured or guessed, see docs/sweeps.md; seconds of a stage, of an RL step, of a rollout of
# distillation, of the evaluations after a stage
STAGES_S = ("data", "evaluation", "vm_cpt", "direct_sft", "cot_sft", "rl", "rollout")
SECONDS: dict[int, dict[str, float]] = {
    2: dict(zip(STAGES_S, (10, 35, 40, 30, 25, 1.8, 0.004), strict=True)),
    4: dict(zip(STAGES_S, (20, 70, 180, 60, 70, 3.5, 0.008), strict=True)),
    6: dict(zip(STAGES_S, (30, 150, 600, 90, 150, 6, 0.012), strict=True)),
}
GTA_SECONDS: dict[str, float] = dict(zip(STAGES_S, (60, 240, 600, 300, 300, 12, 0.03), strict=True))

# ours: deeper policies have more cases to be seen
DEEPER = {
    2: {},
    4: {"data.train_per_policy": 800, "data.cot_per_policy": 240, "rl.steps": 200},
    6: {"data.train_per_policy": 1600, "data.cot_per_policy": 480, "rl.steps": 300},
}


def get_sweep(argument: str | None = None) -> Sweep:
    """The sweep of "small", "full,split=validation", "small,seeds=5", ...; None = small.

    Raises:
        ValueError: another argument, with the closest match.
    """
    scale, split, seeds = parse_argument(argument or "small")
    tuning = split == "validation"
    clevr = [(variant, depth) for variant in "TM" for depth in (2, 4, 6)]
    columns = tuple(
        Column(
            f"{variant}{depth}",
            f"Clevr-{variant}, depth {depth}",
            ("clevr_policy", variant, depth),
            functools.partial(make_clevr, variant, depth, split, SUITES + MORE_SUITES[scale]),
            depth,
            SECONDS[depth],
        )
        for variant, depth in clevr
    )
    gta = Column(
        "GTA",
        "GTA, synthetic",
        ("gta_policy", "", 0),
        functools.partial(make_gta, GTA_SUITES + MORE_SUITES[scale]),
        0,
        GTA_SECONDS,
    )
    chosen = tuple(name for name in SCALES[scale] if not (tuning and name == "GTA"))
    return Sweep(
        name="-".join(["paper_tables", scale, *(["validation"] if tuning else [])]),
        rows=ROWS,
        columns=(*columns, gta),
        chosen=chosen,
        seeds=tuple(range(seeds)),
        claims=CLAIMS,
        note="questions of the validation split, for tuning: not results" if tuning else "",
    )


def parse_argument(argument: str) -> tuple[str, str, int]:
    """(scale, split, number of seeds)."""
    scale, split, seeds = "small", "test", "3"
    for part in argument.split(","):
        key, sign, value = part.partition("=")
        if not sign and key in SCALES:
            scale = key
        elif key == "split" and value in ("test", "validation"):
            split = value
        elif key == "seeds" and value.isdecimal() and int(value):
            seeds = value
        else:
            known = [*SCALES, "split=test", "split=validation", "seeds=3"]
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown '{part}' in the sweep's argument{hint} It takes {known}")
    return scale, split, int(seeds)


def make_clevr(
    variant: str, depth: int, split: str, suites: tuple[str, ...], method: str
) -> ConfigDict:
    """ClevrPolicy on the nano model."""
    config = nano.get_config(f"method={method}")
    config.data.variant = variant
    config.data.depth = depth
    config.data.override = QUESTIONS
    config.data.test = QUESTIONS
    if split == "validation":
        config.data.validation = QUESTIONS
    config.eval.split = split
    config.eval.examples = QUESTIONS
    config.eval.suites = suites
    if (variant, depth) != ("T", 2):  # the sizes in configs/nano.py are those of T, depth 2
        set_auto_sizes(config)
    for path, value in DEEPER[depth].items():
        section, _, key = path.rpartition(".")
        if section in config:
            config[section][key] = value
    return config


def make_gta(suites: tuple[str, ...], method: str) -> ConfigDict:
    """GTAPolicy with drawn pictures on the nano model."""
    config = gta_policy.get_config(f"method={method}")
    config.eval.suites = suites
    return config


def set_auto_sizes(config: ConfigDict) -> None:
    """Buckets, windows and completion length from the data, as in configs/own_policy.py."""
    for key in ("windows", "prompt_buckets", "row_buckets", "max_new_tokens"):
        del config[key]
        config[key] = "auto"
