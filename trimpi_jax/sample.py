"""The door to try a model: one answer in the terminal, or a local page to ask it.

    python -m trimpi_jax.sample --model runs/nano --image a.png --prompt "Which case?"
    echo "Which case?" | python -m trimpi_jax.sample --model runs/nano --image a.png --json
    python -m trimpi_jax.sample --model runs/nano --image a.png --prompt "..." --policy policy.md
    python -m trimpi_jax.sample --model runs/nano --ui

Next: trimpi_jax/stages/answering.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m trimpi_jax.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a run, stage, checkpoint or model folder")
    add("--image", type=Path, action="append", default=[], help="repeat for several, in order")
    add("--prompt", help="the question; read from standard input when absent")
    add("--policy", type=Path, help="text file of a policy to put into the prompt")
    add("--json", action="store_true", help="print one JSON object: text, boxed, tokens, times")
    add("--max-new-tokens", type=int, default=256)
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--seed", type=int, default=0, help="of sampling with a temperature")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--ui", action="store_true", help="open a page on 127.0.0.1 (extra demo)")
    add("--base", type=Path, help="with --ui: model that reads the policy; default: the run's base")
    add("--port", type=int, default=7860, help="with --ui")
    return parser


def run(options: argparse.Namespace) -> None:
    """Answer once, or serve the page.

    Raises:
        ValueError, OSError, ImportError: what is wrong with the options, files or folders.
    """
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if options.ui:
        idle = [
            name
            for name, given in (
                ("--image", options.image),
                ("--prompt", options.prompt is not None),
                ("--json", options.json),
                ("--temperature", options.temperature),
                ("--seed", options.seed),
            )
            if given
        ]
        if idle:
            raise ValueError(f"{', '.join(idle)}: without effect with --ui")
        from trimpi_jax.stages.demo import serve

        serve(
            options.model,
            options.base,
            policy=_read_text(options.policy) if options.policy else "",
            max_new_tokens=options.max_new_tokens,
            dtype=options.dtype,
            port=options.port,
        )
        return
    if options.base or options.port != 7860:
        raise ValueError("--base and --port: without effect unless --ui is given")
    if options.seed and not options.temperature:
        raise ValueError("--seed: without effect at temperature 0 (greedy)")
    images = [path.read_bytes() for path in options.image]
    policy = _read_text(options.policy) if options.policy else ""
    if options.policy and not policy.strip():
        raise ValueError(f"--policy {options.policy} is empty")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    from trimpi_jax.stages.answering import check_question, make_question, open_model

    question = make_question(prompt.strip(), images, policy)
    check_question(question)  # before the weights are read
    answer = open_model(options.model, dtype=options.dtype).ask(
        question,
        policy_in_prompt=bool(policy),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    print(json.dumps(dataclasses.asdict(answer)) if options.json else answer.text)
    if not options.json:
        ended = "" if answer.stopped else ", cut off at the length limit"
        print(
            f"{answer.prompt_tokens} prompt tokens in {answer.prefill_ms:.1f} ms,"
            f" {answer.completion_tokens} new tokens in {answer.decode_ms:.1f} ms{ended}",
            file=sys.stderr,
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error


if __name__ == "__main__":
    main()
