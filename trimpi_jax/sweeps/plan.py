"""What a sweep is: rows, columns, seeds, the claims to check; and the runs that follow from them.

    row        a method, as the paper's table has it            "TriMPI PoRo-GRPO"
    column     a task                                           "T, depth 2"
    run        one row of one column with one seed: a whole ml-collections config
    group      runs of one column and seed: the same data and questions, so stages can be shared
               between them and answers compared question by question
    claim      something that the paper says about rows, to be checked by numbers

Source: paper section 6.
Next: trimpi_jax/sweeps/identity.py
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

FREE, AWARE, CHANGED = "main", "in_context", "override"  # the suites that claims are about


@dataclasses.dataclass(frozen=True)
class Row:
    """A method of the table."""

    name: str  # of files and claims
    label: str
    method: str  # of configs/methods.py
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shows: str = FREE  # the suite whose result stands in the main table
    paper: str = ""  # key of io/paper_figures.py; "" = the paper has no such row


@dataclasses.dataclass(frozen=True)
class Column:
    """A task of the table."""

    name: str
    label: str
    paper: tuple[str, str, int]  # key of io/paper_figures.py
    recipe: Callable[[str], ConfigDict]  # method -> config of a run with seed 0
    depth: int = 0  # questions on a policy's longest path; 0 = no trees
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # see `estimate`


@dataclasses.dataclass(frozen=True)
class Claim:
    """first - second > more_than, or first > more_than where there is no second; in points.

    `grows`: the claim is that the difference grows with depth, by more than `more_than` points a
    question, over the columns of one variant.
    """

    name: str
    text: str
    first: str  # a row
    second: str = ""
    suite: str = FREE
    second_suite: str = ""  # "" = the same
    more_than: float = 0.0
    grows: bool = False
    columns: tuple[str, ...] = ()  # () = all


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of the sweep."""

    row: Row
    column: Column
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        return f"{self.group}-{self.row.name}"

    @property
    def group(self) -> str:
        return f"{self.column.name}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Everything that is run and asked. `note` stands at the head of the page."""

    name: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]  # of the table
    chosen: tuple[str, ...]  # those of them that are run; the others are shown as not run
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    note: str = ""


def load_sweep(text: str) -> Sweep:
    """`FILE.py` or `FILE.py:ARGUMENT`: what its `get_sweep(ARGUMENT)` gives.

    Raises:
        ValueError, OSError: no such file, no such function, or an argument that it refuses.
    """
    name, _, argument = text.partition(":")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"--sweep {name}: no such file; e.g. configs/sweeps/paper_tables.py"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"--sweep {name} has no function get_sweep(argument)")
    return module.get_sweep(argument or None)


def make_runs(sweep: Sweep, changes: Mapping[str, Any] | None = None) -> list[Run]:
    """The list of runs: column by column, seed by seed, row by row.

    Args:
        sweep: what to run.
        changes: settings for all runs, flat ("rl.steps": 20); a run without that section is left
            as it is.

    Raises:
        ValueError: names that occur twice, a change that no run has, budgets that differ, a claim
            about a row that is not there.
    """
    _check_names(sweep)
    changes, used = dict(changes or {}), set()
    runs = []
    for column in (one for one in sweep.columns if one.name in sweep.chosen):
        for seed in sweep.seeds:
            for row in sweep.rows:
                config = column.recipe(row.method)
                config.seed = seed
                if "seed" in config.data:  # other policies and pictures, too
                    config.data.seed = seed
                apply(config, row.overrides, f"row {row.name}")
                for path, value in changes.items():
                    if has_section(config, path):
                        apply(config, {path: value}, "--set")
                        used.add(path)
                runs.append(Run(row, column, seed, config))
    set_rollout_budgets(runs, chosen=frozenset(changes))
    if unused := sorted(changes.keys() - used):
        raise ValueError(f"--set {', '.join(unused)}: no run of {sweep.name} has such a section")
    check_budgets(runs)
    return runs


def apply(config: ConfigDict, changes: Mapping[str, Any], who: str) -> None:
    """Change settings that the config has.

    Raises:
        ValueError: an unknown one, with the closest match, or a value of another type.
    """
    for path, value in changes.items():
        section, *names = config, *path.split(".")
        for name in names[:-1]:
            section = section[name] if name in section else ConfigDict()
        if names[-1] not in section:
            close = difflib.get_close_matches(names[-1], list(section.keys()), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{who}: the config {config.name} has no {path}{hint}")
        try:
            section[names[-1]] = value
        except TypeError as error:
            raise ValueError(f"{who}: {path}={value!r}: {error}") from error


def has_section(config: ConfigDict, path: str) -> bool:
    """Whether the part of a path before its last dot is there."""
    section = config
    for name in path.split(".")[:-1]:
        if name not in section:
            return False
        section = section[name]
    return True


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """`rl.steps=20` -> {"rl.steps": 20}; what is no Python literal is text.

    Raises:
        ValueError: no `=`, or a path twice.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        path, sign, value = text.partition("=")
        if not sign or not path or path in changes:
            raise ValueError(f"--set is PATH=VALUE, each path once; got '{text}'")
        try:
            changes[path] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[path] = value
    return changes


def set_rollout_budgets(runs: Sequence[Run], chosen: frozenset[str] = frozenset()) -> None:
    """Rows that could sample more or less than plain RL get its budget, in place.

    Dynamic sampling draws as many prompts as it needs, so it gets a limit; distillation has a
    number of its own. What a row's overrides or `chosen` name stays as it is (`check_budgets` then
    has its say).
    """
    for group in dict.fromkeys(run.group for run in runs):
        members = [run for run in runs if run.group == group]
        planned = {planned_rollouts(run.config) for run in members if "rl" in run.config}
        for run in members:
            config, named = run.config, chosen | run.row.overrides.keys()
            if "rl" in config and is_dynamic(config) and not config.rl.max_rollouts:
                config.rl.max_rollouts = planned_rollouts(config)
            free = "distillation" in config and "distillation.rollouts" not in named
            if free and len(planned) == 1:
                config.distillation.rollouts = min(planned)


def planned_rollouts(config: ConfigDict) -> int:
    """Rollouts of the steps of an RL stage, one batch of prompts each."""
    return config.rl.steps * config.rl.prompts * 2 * config.rl.group_size


def is_dynamic(config: ConfigDict) -> bool:
    """Whether a step may draw further prompts."""
    return config.rl.get("max_attempts", 1) > 1


def rollout_budget(config: ConfigDict) -> int:
    """Rollouts that a run may sample for training at most."""
    if "distillation" in config:
        return config.distillation.rollouts
    if "rl" not in config:
        return 0
    limit, planned = config.rl.max_rollouts, planned_rollouts(config)
    if is_dynamic(config):
        most = planned * config.rl.max_attempts
        return min(most, limit) if limit else most
    return min(planned, limit) if limit else planned


def check_budgets(runs: Sequence[Run]) -> None:
    """Rows of one column must be comparable.

    Equal data, questions and base model for all; equal rollouts for all rows that sample.

    Raises:
        ValueError: every difference.
    """
    problems: dict[str, None] = {}
    groups: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
        if run.config.get("checkpoint_dir"):
            problems["checkpoint_dir must be empty: runs share their stages in the workdir"] = None
    for group in groups.values():
        first = group[0]
        for run in group[1:]:
            for key in ("data", "model_dir", "eval", "dtype"):
                if _plain(run.config[key]) != _plain(first.config[key]):
                    problems[f"{run.name}: its {key} differs from that of {first.name}"] = None
        budgets = {run.row.name: rollout_budget(run.config) for run in group}
        budgets = {name: budget for name, budget in budgets.items() if budget}
        if len(set(budgets.values())) > 1:
            problems[f"{first.group}: rollouts differ: {budgets}"] = None
    if problems:
        raise ValueError("rows that cannot be compared:\n  " + "\n  ".join(problems))


def select(runs: Sequence[Run], only: str = "") -> list[Run]:
    """The runs whose name has a match of the regular expression.

    Raises:
        ValueError: a broken expression, or it matches none.
    """
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"--only '{only}' is no regular expression ({error})") from error
    chosen = [run for run in runs if pattern.search(run.name)]
    if not chosen:
        raise ValueError(f"--only '{only}' matches no run; names are like {runs[0].name}")
    return chosen


def choose_shard(runs: Sequence[Run], text: str, seconds: Mapping[str, float]) -> list[Run]:
    """The runs of machine i of n, from "i/n" with i = 1..n.

    Whole groups go to one machine, since their runs share stages: the longest first, each to the
    machine that has least to do. The same list of runs gives the same parts everywhere.

    Args:
        runs: all of the sweep, so that every machine sees the same.
        text: "i/n"; "" = all.
        seconds: group -> estimated seconds.

    Raises:
        ValueError: not of that form, or more machines than groups.
    """
    if not text:
        return list(runs)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"--shard is i/n with i from 1 to n, e.g. 1/3; got '{text}'")
    groups = sorted(dict.fromkeys(run.group for run in runs), key=lambda g: (-seconds[g], g))
    if count > len(groups):
        raise ValueError(
            f"--shard {text}: the runs fall into {len(groups)} groups that share data and stages"
            f" ({', '.join(sorted(groups))}); take at most {len(groups)} machines"
        )
    load = dict.fromkeys(range(1, count + 1), 0.0)
    mine = set()
    for group in groups:
        machine = min(load, key=lambda m: (load[m], m))
        load[machine] += max(seconds[group], 1e-9)
        if machine == number:
            mine.add(group)
    return [run for run in runs if run.group in mine]


def _check_names(sweep: Sweep) -> None:
    problems = []
    for what, parts in (("row", sweep.rows), ("column", sweep.columns), ("claim", sweep.claims)):
        names = [part.name for part in parts]
        problems += [f"{what} '{name}' occurs twice" for name in names if names.count(name) > 1]
        problems += [
            f"{what} name '{name}' must be letters, digits and _"
            for name in names
            if not re.fullmatch(r"\w+", name)
        ]
    if len(set(sweep.seeds)) < len(sweep.seeds) or not sweep.seeds:
        problems.append(f"seeds must be distinct and at least one, got {sweep.seeds}")
    rows = {row.name for row in sweep.rows}
    columns = {column.name for column in sweep.columns}
    if unknown := sorted(set(sweep.chosen) - columns) or not sweep.chosen:
        problems.append(f"chosen columns {unknown or '()'} are not among {sorted(columns)}")
    for claim in sweep.claims:
        missing = {claim.first, claim.second} - rows - {""}
        problems += [f"claim {claim.name}: no row '{name}'" for name in sorted(missing)]
        if unknown := sorted(set(claim.columns) - columns):
            problems.append(f"claim {claim.name}: no column {unknown}")
        if claim.grows and not claim.second:
            problems.append(f"claim {claim.name}: a trend needs two rows")
        if not math.isfinite(claim.more_than):
            problems.append(f"claim {claim.name}: more_than must be a number")
    if problems:
        raise ValueError(f"sweep {sweep.name}: " + "; ".join(dict.fromkeys(problems)))


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
