"""VM-CPT: continual pretraining on the policy document itself, visual tokens masked.

    x = (P_T, P_I, I, Q, C, A);   L = - E[ (1 / sum m_t) sum_t m_t log p(x_t | x_<t) ]
    m_t = 0 on every visual token (policy images and input images), 1 on every other token

The document is a target here, not only a condition, so its rules enter the weights; the visual
tokens are inputs that no next-token loss can be asked of.

Source: paper section 4 (full parameters, 5 epochs, learning rate 1e-5 for the 7B model).
Next: trimpi_jax/stages/sft.py
"""

from __future__ import annotations

from data_pipelines.example import Example
from trimpi_jax.inputs.encode import EncodedRow, encode_example
from trimpi_jax.models.processor import Processor

SPLIT = "cot"


def encode_vm_cpt_row(example: Example, processor: Processor) -> EncodedRow:
    """The whole sequence of an Example, every text token a target."""
    return encode_example(example, processor, policy_in_prompt=True, with_cot=True, loss_on="text")
