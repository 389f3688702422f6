"""The door of export: a run's weights as a folder that transformers, vLLM and SGLang serve.

    python -m trimpi_jax.export --checkpoint runs/nano --out /some/folder
    python -m trimpi_jax.export --checkpoint runs/nano/2_cot_sft --out /some/folder --adapter

Next: trimpi_jax/stages/export_model.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a run's folder, one of its stages, a checkpoint, or a model folder"
)
_OUT = flags.DEFINE_string("out", None, "folder to write; must not exist or be empty")
_ADAPTER = flags.DEFINE_bool("adapter", False, "write the LoRA weights as PEFT stores them")
_DTYPE = flags.DEFINE_string(
    "dtype", "", "float32, bfloat16 or float16; default: the base model's, float32 for an adapter"
)
_SHARD_GB = flags.DEFINE_float(
    "max_shard_gb", 5.0, "start a new file beyond this many GiB", lower_bound=0.0
)
flags.mark_flags_as_required(["checkpoint", "out"])


def main(argv: list[str]) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.ERROR)  # orbax warns of files that it does not need
    from trimpi_jax.stages.export_model import export  # heavy imports only after the flags

    try:
        print(
            export(
                Path(str(_CHECKPOINT.value)),
                Path(str(_OUT.value)),
                adapter=_ADAPTER.value,
                dtype=_DTYPE.value,
                max_shard_bytes=int(_SHARD_GB.value * 2**30),
            )
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the folder was not written")
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
