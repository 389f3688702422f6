"""The commands of the guides: scripts, settings, flags and config keys that they name are there."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "docs" / name for name in ("scale_out.md", "saving.md")]
PASSES_ON = (
    "watch.sh",
    "launch.sh",
    "ssh_hosts.sh",
    "gke.sh",
)  # what stands after -- is training's


def read_commands(path: Path) -> list[str]:
    """The lines of a guide's blocks, joined where they go on."""
    blocks = re.findall(r"^```\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [
        line.split(" #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def flags_of(module: str) -> set[str]:
    """The flags that a door defines, from its source."""
    text = (ROOT / "trimpi_jax" / f"{module}.py").read_text()
    if "define_start_flags()" in text:
        text += (ROOT / "trimpi_jax" / "io" / "hosts.py").read_text()
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text))


def check_arguments(module: str, words: list[str], where: str) -> None:
    known = flags_of(module)
    config_file, keys = "configs/nano.py", []
    for at, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        if name.startswith("config."):
            keys.append(name.removeprefix("config."))
            continue
        assert name in known, f"{where}: {module} has no flag --{name}"
        if name == "config":
            config_file = value or words[at + 1]
    if config_file == "...":
        config_file = "configs/nano.py"
    path, _, argument = config_file.partition(":")
    spec = importlib.util.spec_from_file_location("guide_config", ROOT / path)
    assert spec is not None and spec.loader is not None
    module_of_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module_of_config)
    config = module_of_config.get_config(argument or None)
    for key in keys:
        section = config
        for part in key.split("."):
            assert part in section, f"{where}: {config_file} has no key {key}"
            section = section[part]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_command_of_the_guide_names_what_is_there(path):
    doors = scripts = 0
    for line in read_commands(path):
        for script in re.findall(r"tpu_scripts/([\w.]+)", line):
            assert (ROOT / "tpu_scripts" / script).is_file(), line
            scripts += 1
        words = shlex.split(line)
        found = re.search(r"-m trimpi_jax\.(\w+)", line)
        script = next((name for name in PASSES_ON if f"tpu_scripts/{name}" in line), "")
        if found:
            check_arguments(found[1], words[words.index(f"trimpi_jax.{found[1]}") + 1 :], line)
            doors += 1
        elif script and "--" in words:
            module = re.search(r"MODULE=trimpi_jax\.(\w+)", line)
            after = words[words.index("--") + 1 :]
            check_arguments(module[1] if module else "train", after, line)
            doors += 1
    assert doors > 1
    assert scripts > 5 or path.name == "saving.md"


def test_settings_that_the_guide_names_are_read_by_the_scripts():
    scripts = "\n".join(path.read_text() for path in (ROOT / "tpu_scripts").iterdir())
    text = (ROOT / "docs" / "scale_out.md").read_text()
    named = set(re.findall(r"\b([A-Z][A-Z_]+)=", text)) - {
        "NCCL_DEBUG",
        "JAX_COMPILATION_CACHE_DIR",
    }
    assert len(named) > 8
    assert not [name for name in named if f"${{{name}" not in scripts]


def test_extras_that_the_guides_name_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    text = "".join(path.read_text() for path in GUIDES)
    named = set(re.findall(r"(?:trimpi_jax|\.)\[(\w+)\]", text))
    named |= {one for group in re.findall(r"EXTRAS=([\w,]+)", text) for one in group.split(",")}
    assert {"cuda13", "gcs", "tpu"} <= named <= extras.keys()


def test_statuses_of_the_guide_are_those_of_the_loop_and_the_scripts():
    from trimpi_jax.stages.loop import EXIT_STOPPED

    assert f"| {EXIT_STOPPED} | stopped" in (ROOT / "docs" / "scale_out.md").read_text()
    settings = (ROOT / "tpu_scripts" / "settings.sh").read_text()
    assert re.search(rf"EXIT_START_AGAIN=.*{EXIT_STOPPED}", settings)
