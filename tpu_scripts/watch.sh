#!/usr/bin/env bash
# Keeps a run going until it is finished: starts it, starts it again when it stopped itself (exit
# status 75) or was ended by a signal (128 and above: killed, or the neighbour of one that was), and
# after a preemption rents, sets up and starts everything anew.
#
#     ZONE=... PROVISIONING=queued-spot tpu_scripts/watch.sh [--dry-run] -- --config ... --workdir ...
#
# What stands after -- goes to launch.sh. Ends with 0 when training is finished, with 1 and the end of
# the log when it failed: a run that failed would fail again. An answer that cannot be had (network,
# login) changes nothing; so many in a row (MAX_UNKNOWN) end the watch, never the TPU.
#
# Settings: those of create.sh, setup.sh and launch.sh; MAX_RESTARTS MAX_UNKNOWN POLL_S
# ALLOW_LOCAL_WORKDIR (1 = a workdir on the VM's own disk, which a preemption deletes)
set -euo pipefail

MAX_RESTARTS="${MAX_RESTARTS:-100}"
MAX_UNKNOWN="${MAX_UNKNOWN:-10}"
ALLOW_LOCAL_WORKDIR="${ALLOW_LOCAL_WORKDIR:-0}"

scripts="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=tpu_scripts/settings.sh
source "$scripts/settings.sh"
parse_arguments "$@"
check_provisioning
need_zone
if is_spot && [[ "$ALLOW_LOCAL_WORKDIR" != 1 && ! " ${REST[*]}" =~ \ --workdir[=\ ]$MOUNT_DIR/ && ! " ${REST[*]}" =~ \ --config\.checkpoint_dir[=\ ]gs:// ]]; then
  usage_error "a spot VM is deleted with its disks: give --workdir under MOUNT_DIR=$MOUNT_DIR (and NFS_SHARE, which setup.sh mounts there), or --config.checkpoint_dir=gs://..., or set ALLOW_LOCAL_WORKDIR=1"
fi

create() { DRY_RUN="$DRY_RUN" "$scripts/create.sh"; }
setup() { DRY_RUN="$DRY_RUN" "$scripts/setup.sh"; }
launch() { DRY_RUN="$DRY_RUN" "$scripts/launch.sh" -- "${REST[@]}"; }

if [[ "$DRY_RUN" == 1 ]]; then
  create
  setup
  launch
  "$scripts/status.sh" --dry-run
  exit 0
fi

restarts=0
unknown=0

# again WHY: counts a restart
again() {
  restarts=$((restarts + 1))
  ((restarts <= MAX_RESTARTS)) || fail "$1, and MAX_RESTARTS=$MAX_RESTARTS is used up"
  say "$1: start $restarts of at most $MAX_RESTARTS"
}

# dont_know WHY: waits, and gives up after MAX_UNKNOWN in a row
dont_know() {
  unknown=$((unknown + 1))
  ((unknown <= MAX_UNKNOWN)) || fail "$1, $unknown times in a row; nothing was changed"
  say "$1 ($unknown of $MAX_UNKNOWN)"
  sleep "$POLL_S"
}

# rent: create and set up; what fails here is asked for again, as capacity comes and goes
rent() { create && setup; }

while true; do
  if ! state="$(tpu_state)"; then
    dont_know "the state of $TPU_NAME is not known"
    continue
  fi
  case "$state" in
    READY) ;;
    CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING | UNKNOWN)
      dont_know "$TPU_NAME is $state"
      continue
      ;;
    *) # ABSENT, PREEMPTED, TERMINATED, STOPPED, ...
      again "$TPU_NAME is $state"
      if [[ "$state" != ABSENT ]]; then
        "$scripts/delete.sh" --yes || say "$TPU_NAME could not be deleted"
      fi
      rent || {
        dont_know "$TPU_NAME could not be had"
        continue
      }
      launch || dont_know "the run could not be started"
      continue
      ;;
  esac
  # a worker that setup.sh never reached (a watch that was killed in between) is "bare"
  if ! found="$(on_workers all "if cd $REMOTE_DIR/source 2>/dev/null && [ -x ../venv/bin/python ]; then tpu_scripts/worker.sh status $RUN_NAME; else echo \"\$(hostname): $RUN_NAME bare\"; fi")"; then
    dont_know "the workers of $TPU_NAME do not answer"
    continue
  fi
  # "HOST: NAME running 12" -> "running 12"
  states="$(sed -n "s/^[^ ]*: $RUN_NAME \(.*\)$/\1/p" <<<"$found")"
  if [[ -z "$states" ]]; then
    dont_know "the workers of $TPU_NAME say nothing of $RUN_NAME"
    continue
  fi
  unknown=0
  if failed="$(grep -vE "^(running .*|exit (0|$EXIT_START_AGAIN|1(2[89]|[3-9][0-9]))|lost|absent|bare)$" <<<"$states")"; then
    WORKER=all "$scripts/logs.sh" || true
    fail "$RUN_NAME ended with $(sort -u <<<"$failed" | paste -sd, -); it would again"
  elif grep -q '^running' <<<"$states"; then
    sleep "$POLL_S"
  elif ! grep -qv '^exit 0$' <<<"$states"; then
    say "$RUN_NAME is finished"
    exit 0
  else
    summary="$(sort <<<"$states" | uniq -c | sed 's/^ *//' | paste -sd, -)"
    if [[ "$summary" =~ ^[0-9]+\ absent$ ]]; then
      say "$RUN_NAME was not started yet"
    else
      again "$RUN_NAME: $summary"
    fi
    # a machine that was restarted has lost its mount; setup does only what is missing
    if grep -qE '^(lost|bare)$' <<<"$states"; then
      setup || {
        dont_know "$TPU_NAME could not be set up"
        continue
      }
    fi
    launch || dont_know "the run could not be started"
  fi
done
