#!/usr/bin/env bash
# Gives the TPU VM back, with its queued resource. What is on its own disks is gone afterwards.
#
#     ZONE=... tpu_scripts/delete.sh [--yes] [--dry-run]
#
# Settings: TPU_NAME PROVISIONING ZONE PROJECT
set -euo pipefail

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
yes=0
if [[ "${REST[*]}" == --yes ]]; then
  yes=1
  REST=()
fi
no_arguments
check_provisioning
need_zone

if [[ "$yes" != 1 && "$DRY_RUN" != 1 ]]; then
  read -r -p "Delete $TPU_NAME in $ZONE, with everything on its disks? [y/N] " answer || answer=n
  [[ "$answer" == [yY]* ]] || fail "nothing was deleted"
fi

# delete_one KIND NAME STATE_FIELD FLAGS...
delete_one() {
  if [[ "$DRY_RUN" != 1 ]]; then
    local state
    state="$(describe "$1" "$2" "$3")"
    if [[ "$state" == ABSENT ]]; then
      say "$2 is not there"
      return
    fi
  fi
  run gcloud compute tpus "$1" delete "$2" "${WHERE[@]}" "${@:4}" --quiet
}

if is_queued; then
  delete_one queued-resources "$TPU_NAME-queued" state.state --force # takes the VM with it
else
  delete_one tpu-vm "$TPU_NAME" state
fi
