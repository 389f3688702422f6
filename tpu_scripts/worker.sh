#!/usr/bin/env bash
# What runs on one machine: keeps a run going without the connection that started it. launch.sh,
# ssh_launch.sh, status.sh, logs.sh and watch.sh call it; nothing of it is about TPUs.
#
#     worker.sh start NAME COMMAND...   starts COMMAND detached; refused while NAME is running
#     worker.sh status NAME             one line: running, exit STATUS, lost (killed) or absent
#     worker.sh log NAME LINES [follow] the end of its log
#     worker.sh stop NAME               SIGTERM: training saves, and ends with status 75
#
# Settings: RUNS_DIR (logs, process ids, exit statuses)
set -euo pipefail

RUNS_DIR="${RUNS_DIR:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)/runs}"

action="${1:?start, status, log or stop}"
name="${2:?the name of the run}"
shift 2
[[ "$name" =~ ^[A-Za-z0-9._-]+$ ]] || {
  echo "error: a run's name has letters, digits, dots, dashes and underscores, got '$name'" >&2
  exit 2
}
mkdir -p "$RUNS_DIR"
log="$RUNS_DIR/$name.log" pid_file="$RUNS_DIR/$name.pid" exit_file="$RUNS_DIR/$name.exit"

# the process and when it was started, so that another process with its number is not taken for it
identity() { ps -o lstart= -p "$1" 2>/dev/null | tr -s ' ' || true; }

state() {
  if [[ ! -f "$pid_file" ]]; then
    echo absent
  elif [[ -f "$exit_file" ]]; then
    echo "exit $(cat "$exit_file")"
  else
    local pid started
    { read -r pid && read -r started; } <"$pid_file"
    if [[ -n "$started" && "$(identity "$pid")" == "$started" ]]; then
      echo "running $pid"
    else
      echo lost # killed, or the machine was restarted
    fi
  fi
}

case "$action" in
  start)
    (($#)) || {
      echo "error: start NAME COMMAND..." >&2
      exit 2
    }
    now="$(state)"
    if [[ "$now" == running* ]]; then
      echo "error: $(hostname): $name is $now already; worker.sh stop $name ends it" >&2
      exit 3
    fi
    rm -f "$exit_file"
    printf '%s start: %s\n' "$(date -u +%FT%TZ)" "$*" >>"$log"
    # setsid: the run outlives this connection. Its shell hands SIGTERM on and writes the status.
    # shellcheck disable=SC2016 # expanded by the inner shell
    setsid nohup bash -c '
      exit_file="$1"; shift
      trap "kill -TERM \$child 2>/dev/null || true" TERM
      "$@" & child=$!
      status=0; wait "$child" || status=$?
      while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
      echo "$status" >"$exit_file.part"; mv "$exit_file.part" "$exit_file"
    ' "$name" "$exit_file" "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    printf '%s\n%s\n' "$pid" "$(identity "$pid")" >"$pid_file"
    echo "$(hostname): $name started, process $pid, log $log"
    ;;
  status) echo "$(hostname): $name $(state)" ;;
  log)
    lines="${1:-50}"
    [[ -f "$log" ]] || {
      echo "error: $(hostname): there is no log of $name" >&2
      exit 1
    }
    if [[ "${2:-}" == follow ]]; then exec tail -n "$lines" -F "$log"; fi
    tail -n "$lines" "$log"
    ;;
  stop)
    now="$(state)"
    if [[ "$now" == running* ]]; then
      kill -TERM "${now#running }"
      echo "$(hostname): $name was asked to save and stop"
    else
      echo "$(hostname): $name is not running ($now)"
    fi
    ;;
  *)
    echo "error: start, status, log or stop, got '$action'" >&2
    exit 2
    ;;
esac
