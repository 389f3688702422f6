#!/usr/bin/env bash
# Rents, sets up, looks (trimpi_jax.doctor on all workers), trains the nano model for a few steps, and
# gives everything back, whatever happens in between.
#
#     ZONE=... ACCELERATOR_TYPE=v5litepod-8 PROVISIONING=spot tpu_scripts/smoke.sh [--dry-run]
#
# Settings: those of create.sh and setup.sh; KEEP (1 = do not delete), TRAIN (0 = doctor only, for
# slices of several hosts)
set -euo pipefail

KEEP="${KEEP:-0}"
TRAIN="${TRAIN:-1}"

scripts="$(dirname -- "${BASH_SOURCE[0]}")"
export TPU_NAME="${TPU_NAME:-trimpi-smoke}" # never the TPU of a real run
# shellcheck source=tpu_scripts/settings.sh
source "$scripts/settings.sh"
parse_arguments "$@"
no_arguments
check_provisioning
need_zone
export DRY_RUN TPU_NAME

give_back() {
  local status=$?
  if [[ "$KEEP" == 1 ]]; then
    say "KEEP=1: $TPU_NAME is still there, and costs"
  else
    "$scripts/delete.sh" --yes || say "error: $TPU_NAME could not be deleted; it costs until it is"
  fi
  ((status == 0)) || say "smoke failed, exit status $status"
  exit "$status"
}

if [[ "$DRY_RUN" != 1 && "$(tpu_state)" != ABSENT ]]; then
  fail "$TPU_NAME exists already; smoke deletes what it used, so give it another TPU_NAME"
fi
trap give_back EXIT
"$scripts/create.sh"
"$scripts/setup.sh"
on_workers all "cd $REMOTE_DIR/source && ../venv/bin/python -m trimpi_jax.doctor"
if [[ "$TRAIN" == 1 ]]; then
  on_workers all "cd $REMOTE_DIR/source && ../venv/bin/python -m trimpi_jax.train --config configs/nano.py --workdir ../smoke --config.data.train_per_policy=16 --config.data.cot_per_policy=16 --config.data.test=16 --config.eval.examples=16 --config.eval.rows=16 --config.vm_cpt.epochs=1 --config.cot_sft.epochs=1 --config.rl.steps=2"
fi
say "smoke passed"
