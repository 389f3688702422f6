"""Programs that stand in for gcloud, kubectl, ssh and others: they record what they were asked.

`stand_ins(folder, answers)` makes a PATH on which each name is this file; it appends
its name and arguments to `calls.jsonl` and gives the first answer that fits and is not used up:

    {"match": regex of "NAME ARGUMENTS", "out": "", "err": "", "status": 0, "times": 1,
     "does": shell command instead, with the last argument as $1}

What no answer fits succeeds silently. Must run by itself, without this package.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NAMES = "gcloud kubectl ssh scp xpk srun scontrol sbatch docker sleep".split()
SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"


class StandIns:
    """A PATH of stand-ins, and what they were asked."""

    def __init__(self, folder: Path, answers: list[dict]):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.answer(answers)
        for name in NAMES:
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {name} "$@"\n')
            program.chmod(0o755)

    def answer(self, answers: list[dict]) -> None:
        """Replace the answers; earlier calls are not counted against them."""
        (self.folder / "answers.json").write_text(json.dumps(answers))
        (self.folder / "used.json").write_text("{}")

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """Run a script of tpu_scripts with these settings and nothing else of ours around."""
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "STAND_IN": str(self.folder),
            **settings,
        }
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *arguments],
            env=environment,
            cwd=SCRIPTS.parent,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def calls(self, *, of: str = "") -> list[str]:
        """What was asked, one string a call: the name and its arguments, as JSON records them."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [" ".join(json.loads(line)) for line in lines]
        return [call for call in calls if call.startswith(of) and not call.startswith("sleep")]


def main() -> None:
    folder = Path(os.environ["STAND_IN"])
    call = sys.argv[1:]
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")
    used = json.loads((folder / "used.json").read_text())
    for number, answer in enumerate(json.loads((folder / "answers.json").read_text())):
        times = used.get(str(number), 0)
        if not re.search(answer["match"], " ".join(call), re.DOTALL):
            continue
        if times == answer.get("times", 1):
            continue
        used[str(number)] = times + 1
        (folder / "used.json").write_text(json.dumps(used))
        if "does" in answer:
            os.execv("/bin/bash", ["bash", "-c", answer["does"], "bash", call[-1]])
        sys.stdout.write(answer.get("out", ""))
        sys.stderr.write(answer.get("err", ""))
        sys.exit(answer.get("status", 0))


if __name__ == "__main__":
    main()
