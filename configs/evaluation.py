"""What every recipe's evaluation has: sizes, and the files of the general benchmarks.

--config.eval.forgetting.mmlu_pro=FILE   also mmmu_pro, mmmu_pro_vision, wildguard
"""

from ml_collections import ConfigDict


def make_eval(*, examples: int, rows: int, nano: int = 0, new_tokens: int = 1024) -> ConfigDict:
    section = ConfigDict({"examples": examples, "rows": rows})
    # evaluate in the middle of a stage, too; 0 = only before the first and after each
    section.every_steps = 0
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
    return section
