#!/usr/bin/env bash
# Training on machines that are reached by plain ssh: starts the same command on all of them, with
# the three flags that tell each who it is.
#
#     HOSTS="gpu1 gpu2" tpu_scripts/ssh_hosts.sh start [--dry-run] -- --config ... --workdir ...
#     HOSTS="gpu1 gpu2" tpu_scripts/ssh_hosts.sh status | log | stop
#
# Every host has this package at HOST_SOURCE_DIR, with a Python of HOST_PYTHON, and sees the workdir.
# HOSTS may be USER@HOST; the first is the coordinator, which the others reach at PORT.
# Settings: HOSTS HOST_SOURCE_DIR HOST_PYTHON PORT SSH_OPTIONS RUN_NAME MODULE LINES_SHOWN
set -euo pipefail

HOSTS="${HOSTS:-}"
HOST_SOURCE_DIR="${HOST_SOURCE_DIR:-trimpi/source}"
HOST_PYTHON="${HOST_PYTHON:-../venv/bin/python}" # from HOST_SOURCE_DIR
PORT="${PORT:-8476}"
COORDINATOR="${COORDINATOR:-}" # HOST:PORT, when the others know the first host by another name
SSH_OPTIONS="${SSH_OPTIONS:--o BatchMode=yes -o ConnectTimeout=15}"
MODULE="${MODULE:-trimpi_jax.train}"
LINES_SHOWN="${LINES_SHOWN:-50}"

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
action="${REST[0]:-}"
arguments=("${REST[@]:1}")
read -ra hosts <<<"$HOSTS"
read -ra options <<<"$SSH_OPTIONS"
((${#hosts[@]})) || usage_error 'HOSTS is not set, e.g. HOSTS="gpu1 gpu2"'
[[ "$action" =~ ^(start|status|log|stop)$ ]] || usage_error "start, status, log or stop, got '$action'"
repeated="$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)"
[[ -z "$repeated" ]] || usage_error "a host stands twice in HOSTS: $repeated"
need_program ssh "it comes with OpenSSH"

on_host() { run ssh "${options[@]}" "$1" "cd $HOST_SOURCE_DIR && $2"; }

if [[ "$action" == start ]]; then
  coordinator="${COORDINATOR:-${hosts[0]##*@}:$PORT}"
  for number in "${!hosts[@]}"; do
    command="$(quoted "$HOST_PYTHON" -u -m "$MODULE" "${arguments[@]}" "--coordinator=$coordinator" \
      "--num_processes=${#hosts[@]}" "--process_id=$number")"
    on_host "${hosts[number]}" "tpu_scripts/worker.sh start $RUN_NAME $command" || {
      say "error: ${hosts[number]} could not be started"
      for ((before = 0; before < number; before++)); do # or they would wait for it
        on_host "${hosts[before]}" "tpu_scripts/worker.sh stop $RUN_NAME" || true
      done
      exit 1
    }
  done
  exit 0
fi
((${#arguments[@]} == 0)) || usage_error "unknown arguments: ${arguments[*]}"
failed=0
for host in "${hosts[@]}"; do
  case "$action" in
    log) on_host "$host" "tpu_scripts/worker.sh log $RUN_NAME $LINES_SHOWN" || failed=1 ;;
    *) on_host "$host" "tpu_scripts/worker.sh $action $RUN_NAME" || failed=1 ;;
  esac
done
exit "$failed"
