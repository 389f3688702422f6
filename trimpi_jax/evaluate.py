r"""The door of evaluation: a model's folder in, results as JSON and a table out.

    python -m trimpi_jax.evaluate --model runs/nano/3_rl
    python -m trimpi_jax.evaluate --model runs/nano/3_rl --suite main,override \
        --against runs/nano/2_cot_sft/evaluation
    python -m trimpi_jax.evaluate --config configs/nano.py --model /a/hugging/face/folder

The config is needed for a model that lies in no run; a run's own is the default.

Next: trimpi_jax/stages/evaluate_model.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from trimpi_jax.io.flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe, e.g. configs/nano.py; default: the config of the model's run"
)
_MODEL = flags.DEFINE_string(
    "model", None, "a run's folder, one of its stages, a checkpoint, or a Hugging Face folder"
)
_SUITE = flags.DEFINE_list(
    "suite", [], "what to ask, e.g. main,override; or all; default: main,in_context,override"
)
_OUT = flags.DEFINE_string("out", None, "folder of the results; the stage's evaluation/ by default")
_DATA = flags.DEFINE_string("data", None, "a built dataset; the run's, or the config's, by default")
_AGAINST = flags.DEFINE_string(
    "against", None, "another model's folder of results, to compare with"
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", None, "most questions of a split; config.eval.examples by default"
)
flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you mean --config.KEY=VALUE?")
    logging.set_verbosity(logging.ERROR)  # orbax warns of files that it does not need
    from trimpi_jax.stages.evaluate_folder import evaluate_folder  # heavy imports only now

    def folder(flag) -> Path | None:
        return Path(flag.value) if flag.value else None

    try:
        evaluate_folder(
            Path(str(_MODEL.value)),
            _CONFIG.value,
            suites=_SUITE.value,
            out=folder(_OUT),
            data=folder(_DATA),
            against=folder(_AGAINST),
            examples=_EXAMPLES.value,
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with the answers it has")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
            raise  # not the user's doing: the traceback is what helps
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
