"""A local page to try a model: the internalized one, and the base that reads the policy.

    image, question  ->  internalized model, no policy in its prompt     answer, tokens, ms
                     ->  base model, policy in context                   answer, tokens, ms

Bound to 127.0.0.1, so it is reached from this machine only. Texts of models are shown in text
boxes, never as markup. Nothing is sent anywhere: no fonts from a network, no usage statistics.

Source: gradio (extra `demo`).
Next: trimpi_jax/sample.py
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.example import Example
from trimpi_jax.stages.answering import (
    Answer,
    OpenModel,
    make_question,
    open_model,
    policies_of_run,
)
from trimpi_jax.stages.model_files import model_folder

HOST = "127.0.0.1"
MAX_UPLOAD = "20mb"


def serve(
    given: Path, base: Path | None, *, policy: str, max_new_tokens: int, dtype: str, port: int
) -> None:
    """Open the models and serve the page until it is interrupted.

    Args:
        given: folder of the internalized model.
        base: folder of the model that reads the policy; None = what the run started from.
        policy: text to begin with; "" = that of the run's first policy.
        max_new_tokens: limit of an answer.
        dtype: of activations and decode weights.
        port: on this machine.

    Raises:
        ValueError, OSError: a folder holds no model, there is no base, or the port is taken.
        ImportError: gradio is not installed.
    """
    gradio = import_gradio()
    models = open_pair(given, base, dtype)
    known = policies_of_run(models[0].source)
    page = make_page(models, known, policy, max_new_tokens)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        show_error=True,
        max_file_size=MAX_UPLOAD,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        ssr_mode=False,  # no second server
    )


def import_gradio() -> Any:
    """The library, kept from reporting anything to its makers.

    Raises:
        ImportError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "--ui needs gradio: pip install 'trimpi_jax[demo]' (everything else works without)"
        ) from error
    return gradio


def open_pair(given: Path, base: Path | None, dtype: str) -> tuple[OpenModel, OpenModel]:
    """(the internalized model, the base)."""
    internalized = open_model(given, dtype=dtype)
    if base is None:
        config = internalized.source.run_config()
        if config is None:
            raise ValueError(f"{given} lies in no run: give the base model with --base")
        base = model_folder(config.model_dir)
    return internalized, open_model(base, dtype=dtype)


def answer_both(
    models: tuple[OpenModel, OpenModel],
    image: Image.Image | None,
    query: str,
    policy: str,
    known: Example | None,
    max_new_tokens: int,
) -> tuple[str, str, str, str]:
    """Text and cost of the internalized model, then of the base with the policy in context.

    A known policy brings its own pictures along, as long as its text is unchanged.
    """
    if not policy.strip():
        raise ValueError("the policy is empty: the base would have nothing to read")
    pictures = known.policy_images if known and known.policy_text == policy else ()
    images = [] if image is None else [_as_png(image)]
    question = make_question(query, images, policy, pictures)
    said = []
    for model, aware in zip(models, (False, True), strict=True):
        answer = model.ask(question, policy_in_prompt=aware, max_new_tokens=max_new_tokens)
        said += [answer.text, cost_text(answer)]
    return said[0], said[1], said[2], said[3]


def cost_text(answer: Answer) -> str:
    """`82 prompt tokens, 9.6 ms to read, 32.1 ms to write 73 tokens`."""
    ended = "" if answer.stopped else ", cut off at the length limit"
    return (
        f"{answer.prompt_tokens} prompt tokens, {answer.prefill_ms:.1f} ms to read,"
        f" {answer.decode_ms:.1f} ms to write {answer.completion_tokens} tokens{ended}"
    )


def make_page(
    models: tuple[OpenModel, OpenModel],
    known: dict[str, Example],
    policy: str,
    max_new_tokens: int,
) -> Any:
    """The gradio page."""
    gradio = import_gradio()
    names = list(known)
    first = known[names[0]] if names else None
    policy = policy or (first.policy_text if first else "")

    def on_ask(image, query, text, name):
        try:
            return answer_both(models, image, query, text, known.get(name), max_new_tokens)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    def on_choose(name):
        return known[name].policy_text, known[name].query

    with gradio.Blocks(title="trimpi_jax", analytics_enabled=False) as page:
        gradio.Markdown("## Internalized, and in context")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", label="Image", sources=["upload", "clipboard"])
                query = gradio.Textbox(
                    label="Question", lines=3, value=first.query if first else ""
                )
                name = gradio.Dropdown(
                    names, value=names[0] if names else None, label="Policy", visible=bool(names)
                )
                text = gradio.Textbox(
                    label="Policy that the base reads", lines=6, max_lines=14, value=policy
                )
                ask = gradio.Button("Ask both", variant="primary")
            with gradio.Column():
                free = gradio.Textbox(label="Internalized: no policy in the prompt", lines=8)
                free_cost = gradio.Textbox(label="What it cost", lines=1)
            with gradio.Column():
                aware = gradio.Textbox(label="Base: policy in context", lines=8)
                aware_cost = gradio.Textbox(label="What it cost", lines=1)
        name.change(on_choose, name, [text, query])
        ask.click(on_ask, [image, query, text, name], [free, free_cost, aware, aware_cost])
    return page


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
