#!/usr/bin/env bash
# Starts training on all workers at once, detached: the same command everywhere, since JAX finds the
# other hosts by itself. Started on one worker of several, it would wait for the others and say so.
#
#     ZONE=... tpu_scripts/launch.sh [--dry-run] -- --config configs/nano.py --workdir /mnt/trimpi/nano
#     ZONE=... MODULE=trimpi_jax.doctor RUN_NAME=doctor tpu_scripts/launch.sh
#
# What stands after -- goes to the module. Paths are those of the workers; configs/ is found in the
# source folder. Settings: TPU_NAME ZONE PROJECT SSH_FLAGS REMOTE_DIR RUN_NAME MODULE
set -euo pipefail

MODULE="${MODULE:-trimpi_jax.train}"

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
need_zone
if [[ "$MODULE" == trimpi_jax.train && " ${REST[*]} " != *" --workdir"* ]]; then
  usage_error "give --workdir: a folder that every worker sees and that survives the TPU, e.g. $MOUNT_DIR/$RUN_NAME"
fi

command="$(quoted ../venv/bin/python -u -m "$MODULE" "${REST[@]}")"
on_workers all "cd $REMOTE_DIR/source && tpu_scripts/worker.sh start $RUN_NAME $command"
