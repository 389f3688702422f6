"""Evaluate the model of a folder: open it, find or build its data, run suites, write and show.

    what is asked about     --data DIR, else the data of the run that the model lies in where it was
                            built by the same recipe, else what the config says, built under --out
    where results go        --out, else evaluation/ beside the weights of a run's stage, else
                            runs/evaluate/NAME-DIGEST

Source: paper section 5.
Next: trimpi_jax/evaluate.py
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.build import DATASETS, make_settings
from data_pipelines.shards import MANIFEST, check_dataset, read_manifest
from data_pipelines.streaming import iter_split
from trimpi_jax.io.progress import Progress
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.auto_sizes import fill_auto_sizes
from trimpi_jax.stages.evaluate_model import (
    compare_results,
    read_results,
    result_table,
    run_suites,
)
from trimpi_jax.stages.open_model import ModelSource, find_model, load_model, open_config
from trimpi_jax.stages.pipeline import Run, make_evaluator, make_run_engine
from trimpi_jax.stages.result_files import folder_digest, make_identity, versions, write_json
from trimpi_jax.stages.run_settings import execution
from trimpi_jax.stages.suites import PAPER_SUITES, SUITES, Context, Unavailable
from trimpi_jax.stages.workdir import prepare_data

ALL = "all"
NEEDED = (
    *("attention", "data", "dtype", "layer_loop", "max_new_tokens", "mesh", "name"),
    *("prompt_buckets", "seed", "windows"),
)  # of a config, beside its stages and eval


def evaluate_folder(
    given: Path,
    config: ConfigDict | None = None,
    *,
    suites: Sequence[str] = (),
    out: Path | None = None,
    data: Path | None = None,
    against: Path | None = None,
    examples: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate and return what `results.json` holds.

    Args:
        given: a run's folder, one of its stages or checkpoints, or a Hugging Face folder.
        config: None = that of the run that the model lies in.
        suites: keys of SUITES; none = the paper's, as far as the data has them; ("all",) = every
            one that can run here.
        out: where results are kept; an earlier start is continued there.
        data: a built dataset; None = see the module docstring.
        against: results of another model, to compare with on the same questions.
        examples: most questions of a split; None = config.eval.examples.
        progress: where bars and lines go.

    Raises:
        ValueError, OSError: what is wrong with any of these; all of it before the first question.
        Unavailable: a suite that was named cannot run here; the others are done.
    """
    progress = progress or Progress()
    names = choose_suites(suites)
    suites_were_named = list(suites) not in ([], [ALL])
    source = find_model(given)
    chosen = choose_config(source, config, examples)
    other = read_results(against) if against else {}
    model, processor = open_config(source, chosen)
    model = execution(model, chosen, jax.default_backend())
    digest = folder_digest(source.files)
    out = (out or default_out(source, digest)).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = find_data(chosen, source, out, data, progress)
    splits = read_manifest(data)["splits"]
    chosen = fill_auto_sizes(chosen, {name: iter_split(data, name) for name in splits}, processor)
    mesh = make_mesh(chosen.mesh.data, chosen.mesh.fsdp, chosen.mesh.tensor)
    this = Run(chosen, out, progress, processor, model, mesh)
    with jax.set_mesh(mesh):
        this.engine = make_run_engine(this)
        evaluator = make_evaluator(this)
        params = load_model(source, model, mesh)
        evaluator.load(params)
        about = make_identity(chosen, data) | {"model_sha256": digest}
        context = Context(
            evaluator, params, chosen, data, out, chosen.seed, progress, identity=about
        )
        results, left_out = run_suites(context, names)
    compared = compare_results(results, other, chosen.seed) if against and results else {}
    found = {
        "model": str(source.given),
        "config": chosen.name,
        "data": str(data),
        "identity": about,
        "versions": versions(),
        "suites": {name: _without_records(result) for name, result in results.items()},
    }
    if against:
        found["against"] = {"results": str(against), "suites": compared}
    write_json(out / "results.json", found)
    if results:
        progress.table(result_table(results, compared))
    progress.say(f"results: {out / 'results.json'}")
    if left_out and (suites_were_named or not results):
        reasons = [f"{name}: {reason}" for name, reason in left_out.items()]
        raise Unavailable("\n  ".join(["some suites could not be run:", *reasons]))
    return found


def choose_suites(names: Sequence[str]) -> list[str]:
    """The suites to run: the paper's when none is named, every one for "all".

    Raises:
        ValueError: naming every unknown suite with the closest match.
    """
    if not names:
        return list(PAPER_SUITES)
    if list(names) == [ALL]:
        return list(SUITES)
    unknown = []
    for name in names:
        if name not in SUITES:
            close = difflib.get_close_matches(name, SUITES, n=1)
            unknown.append(f"'{name}'" + (f" (did you mean {close[0]}?)" if close else ""))
    if unknown:
        raise ValueError(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}, or {ALL}")
    return list(dict.fromkeys(names))


def choose_config(
    source: ModelSource, given: ConfigDict | None, examples: int | None
) -> ConfigDict:
    """The given config, or that of the model's run; with another number of questions.

    Raises:
        ValueError: there is none, or it asks nothing.
    """
    found = given or source.run_config()
    if found is None:
        raise ValueError(
            f"{source.given} lies in no run, so --config must say what to ask it, e.g."
            " --config=configs/nano.py"
        )
    if "stages" not in found or "eval" not in found:
        raise ValueError(f"config '{found.get('name', '')}' trains a base model: nothing to ask")
    if missing := sorted(set(NEEDED) - set(found)):
        raise ValueError(
            f"config '{found.get('name', '')}' lacks {missing}, as one of an older version does;"
            " give a present one with --config"
        )
    config = found.copy_and_resolve_references()
    if examples is not None:
        if examples < 1:
            raise ValueError(f"--examples must be at least 1, got {examples}")
        config.eval.examples = examples
    return config


def default_out(source: ModelSource, digest: str) -> Path:
    """Beside the weights of a run's stage; else under runs/evaluate."""
    if source.run is None:
        return Path("runs") / "evaluate" / f"{source.given.name}-{digest[:8]}"
    if source.stage is None:
        return (source.run if source.given.name == "final" else source.given) / "evaluation"
    step = f"-step{source.stage.step}" if source.is_checkpoint else ""
    return source.stage.folder / f"evaluation{step}"


def find_data(
    config: ConfigDict, source: ModelSource, out: Path, data: Path | None, progress: Progress
) -> Path:
    """The checked folder of the dataset, built where there is none.

    Raises:
        ValueError: broken shards, or data of another kind than the config's.
    """
    if data is not None:
        data = data.expanduser().resolve()
        found, wanted = check_dataset(data)["recipe"].get("dataset", ""), config.data.dataset
        if not found.startswith(wanted):
            raise ValueError(f"--data {data} is '{found}', the config asks about '{wanted}'")
        return data
    folder = out / "data"
    if source.run and _has_recipe(source.run / "data", config):
        folder = source.run / "data"
    prepare_data(config, folder, progress)
    return folder


def _has_recipe(folder: Path, config: ConfigDict) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    options = config.data.to_dict()
    dataset = options.pop("dataset")
    wanted = DATASETS[dataset].recipe(make_settings(dataset, options))
    found = dict(read_manifest(folder)["recipe"])
    found.pop("cot", None)
    return found == json.loads(json.dumps(wanted))


def _without_records(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("records", "lines")}
