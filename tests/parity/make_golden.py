"""Writes golden/qwen2_5_vl.npz from transformers: `python -m tests.parity.make_golden`.

The file holds a model small enough to ship (float16 weights under their hub names, its config.json)
and what the reference makes of three rows in float32. The tests that read it need no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.parity.hf_reference import hf_inputs, tiny_model
from tests.parity.rows import make_row
from trimpi_jax.models.hf_weights import load_hf, tensor_specs

GOLDEN = Path(__file__).parent / "golden" / "qwen2_5_vl.npz"
ROWS = ("two_images", "aligned", "text_only")


def main() -> None:
    """Builds the model, runs it, writes the file."""
    model = tiny_model(tied=False, seed=1, vision_width=32, text_width=32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())  # exactly what the file can hold
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config, _ = load_hf(folder)
        arrays["config"] = np.array((Path(folder) / "config.json").read_text())
    state = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in model.named_parameters()
    }
    assert state.keys() == {spec.name for spec in tensor_specs(config)}
    for name, weight in state.items():
        arrays[f"weights/{name}"] = weight.detach().numpy().astype(np.float16)
    for name in ROWS:
        inputs = hf_inputs(make_row(name))
        with torch.no_grad():
            arrays[f"{name}/logits"] = model(**inputs).logits[0].numpy()
            if "pixel_values" in inputs:
                grids = inputs["image_grid_thw"]
                arrays[f"{name}/visual"] = model.model.visual(
                    inputs["pixel_values"], grid_thw=grids
                ).pooler_output.numpy()
                positions, delta = model.model.get_rope_index(
                    inputs["input_ids"], inputs["mm_token_type_ids"], grids
                )
                arrays[f"{name}/positions"] = positions[:, 0].numpy().astype(np.int32)
                arrays[f"{name}/delta"] = delta.numpy().astype(np.int32)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
