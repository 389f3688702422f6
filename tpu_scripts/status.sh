#!/usr/bin/env bash
# Says how the TPU VM is, and how the run is on each worker: running, exit STATUS, lost, absent.
# Status 0 is finished; 75 means "stopped and saved, start me again"; the log tells the rest.
#
#     ZONE=... tpu_scripts/status.sh [--dry-run]
#
# Settings: TPU_NAME PROVISIONING ZONE PROJECT SSH_FLAGS REMOTE_DIR RUN_NAME
set -euo pipefail

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
no_arguments
check_provisioning
need_zone

if [[ "$DRY_RUN" == 1 ]]; then
  if is_queued; then
    run gcloud compute tpus queued-resources describe "$TPU_NAME-queued" "${WHERE[@]}" \
      "--format=value(state.state)"
  fi
  run gcloud compute tpus tpu-vm describe "$TPU_NAME" "${WHERE[@]}" "--format=value(state)"
  state=READY
else
  if is_queued; then
    state="$(queued_state)"
    echo "$TPU_NAME-queued: $state"
  fi
  state="$(tpu_state)"
  echo "$TPU_NAME: $state"
fi
if [[ "$state" == READY ]]; then
  on_workers all "cd $REMOTE_DIR/source && tpu_scripts/worker.sh status $RUN_NAME"
fi
