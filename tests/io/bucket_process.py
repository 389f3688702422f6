"""The toy loop of tests/stages/test_loop.py, its checkpoints in a bucket. See test_bucket.py."""

import json
import sys
from pathlib import Path

from tests.stages.test_loop import BY_EVALUATION, Toy
from trimpi_jax.io.checkpoints import saved_steps
from trimpi_jax.io.storage import claim_folder, claim_problem, probe_problem
from trimpi_jax.stages import loop

folder, bucket = Path(sys.argv[1]), sys.argv[2]
place = f"{bucket}/run/1_toy"
found = {"probe": probe_problem(f"{bucket}/run")}
token, _ = claim_folder(f"{bucket}/run", "config")
stopped = Toy(folder, keep=BY_EVALUATION, checkpoints=place, stops_at=2)
stopped.measured = {2: 0.5}
try:
    stopped.run()
except loop.Stopped as stop:
    found["stopped"] = stop.code
found["after the stop"] = saved_steps(place)
resumed = Toy(folder, keep=BY_EVALUATION, checkpoints=place)
resumed.measured = {4: 0.75}
found["total"] = float(resumed.run()["total"])
found["said"] = resumed.said
found["at the end"] = saved_steps(place)
found["claim"] = claim_problem(f"{bucket}/run", token)
found["no bucket"] = probe_problem("gs://bucket-that-is-not-there/run")
print(json.dumps(found))
