"""What every recipe's evaluation has: sizes, the files of the general benchmarks, the judge.

--config.eval.forgetting.mmlu_pro=FILE   also mmmu_pro, mmmu_pro_vision, wildguard
--config.eval.referral_judge.base_url=URL --config.eval.referral_judge.model=NAME
"""

from ml_collections import ConfigDict


def make_eval(*, examples: int, rows: int, nano: int = 0, new_tokens: int = 1024) -> ConfigDict:
    section = ConfigDict({"examples": examples, "rows": rows})
    # evaluate in the middle of a stage, too; 0 = only before the first and after each
    section.every_steps = 0
    # after each stage; of trimpi_jax.evaluate's suites, main and in_context always among them;
    # override is left out where the data have no such split
    section.suites = ("main", "in_context", "override")
    section.split = "test"  # of the questions; "validation" to tune on
    section.forgetting = ConfigDict(
        {
            "mmlu_pro": "",  # JSONL, JSON or parquet; "" = not asked
            "mmlu_pro_shots": "",  # its validation split: five worked examples before a question
            "mmmu_pro": "",
            "mmmu_pro_vision": "",
            "wildguard": "",
            "nano": nano,  # generated questions on what the nano base can do
            "examples": 0,  # most questions of a benchmark; 0 = all
            "max_new_tokens": new_tokens,
        }
    )
    section.pressure = ConfigDict({"examples": 100})  # questions that are pressed upon
    section.referral_judge = ConfigDict(
        {
            "base_url": "",  # an OpenAI-compatible endpoint; there is no default judge
            "model": "",
            "responses": 100,  # paper section 5
            "attempts": 3,
            "concurrency": 8,
            "timeout_s": 120.0,
            "max_new_tokens": 1024,
            "price_prompt": 0.0,  # of a million tokens, for the cost; 0 = not told
            "price_completion": 0.0,
        }
    )
    return section
