#!/usr/bin/env bash
# Shows the end of a run's log, and goes on with --follow.
#
#     ZONE=... [WORKER=0] [LINES_SHOWN=50] tpu_scripts/logs.sh [--follow] [--dry-run]
#
# Settings: TPU_NAME ZONE PROJECT SSH_FLAGS REMOTE_DIR RUN_NAME WORKER (a number, or all) LINES_SHOWN
set -euo pipefail

WORKER="${WORKER:-0}"
LINES_SHOWN="${LINES_SHOWN:-50}"

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
follow=""
if [[ "${REST[*]}" == --follow ]]; then
  follow=" follow"
  REST=()
fi
no_arguments
need_zone
on_workers "$WORKER" "cd $REMOTE_DIR/source && tpu_scripts/worker.sh log $RUN_NAME $LINES_SHOWN$follow"
