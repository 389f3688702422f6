r"""SFT: learn to answer without the policy in the prompt. Direct (answer only) or with CoT.

    L = - E sum_t log p(o_t | Q, I, o_<t),   o = [CoT; answer], loss on the completion only

The policy is in neither prompt nor target; what is learned is `\boxed{Case k}` or the reasoning
that leads there. The low-rank pairs (LoRA) are merged into the weights when the stage ends.

Source: paper section 4 (Direct SFT, CoT SFT: LoRA rank 8, learning rate 1e-4).
Next: trimpi_jax/stages/rl.py
"""

from __future__ import annotations

from data_pipelines.example import Example
from trimpi_jax.inputs.encode import EncodedRow, encode_example
from trimpi_jax.models.processor import Processor

SPLITS = {"direct_sft": "train", "cot_sft": "cot", "distillation": "cot"}


def encode_sft_row(example: Example, processor: Processor, *, stage: str) -> EncodedRow:
    """The training row of an Example for `direct_sft`, or with its thought for the others."""
    return encode_example(
        example,
        processor,
        policy_in_prompt=False,
        with_cot=stage != "direct_sft",
        loss_on="completion",
    )
