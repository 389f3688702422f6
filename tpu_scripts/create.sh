#!/usr/bin/env bash
# Rents a TPU VM: at once (on-demand, spot) or by a queued resource, and waits until it is there.
#
#     ZONE=... ACCELERATOR_TYPE=v5p-8 PROVISIONING=queued-spot tpu_scripts/create.sh [--dry-run]
#
# Settings: TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION PROVISIONING ZONE PROJECT NETWORK_FLAGS
# VALID_UNTIL_DURATION (how long a request may stay in the queue, e.g. 6h) POLL_S WAIT_S
set -euo pipefail

VALID_UNTIL_DURATION="${VALID_UNTIL_DURATION:-}"

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
no_arguments
check_provisioning
need_zone

if [[ -z "$RUNTIME_VERSION" ]]; then
  case "$ACCELERATOR_TYPE" in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
    *) usage_error "no runtime version is known for ACCELERATOR_TYPE=$ACCELERATOR_TYPE; set RUNTIME_VERSION" ;;
  esac
fi
read -ra network <<<"$NETWORK_FLAGS"

if ! is_queued; then
  command=(gcloud compute tpus tpu-vm create "$TPU_NAME" "${WHERE[@]}"
    "--accelerator-type=$ACCELERATOR_TYPE" "--version=$RUNTIME_VERSION" "${network[@]}")
  if is_spot; then command+=(--spot); fi
  run "${command[@]}"
  exit 0
fi

if [[ "$DRY_RUN" != 1 ]]; then
  # what preempted a queued resource leaves it there, suspended, with the name taken
  state="$(queued_state)"
  case "$state" in
    SUSPENDED | FAILED)
      say "$TPU_NAME-queued is $state: deleted and asked for again"
      run gcloud compute tpus queued-resources delete "$TPU_NAME-queued" "${WHERE[@]}" --force --quiet
      ;;
    ABSENT) ;;
    *) say "$TPU_NAME-queued exists already, state $state" ;;
  esac
fi
if [[ "${state:-ABSENT}" =~ ^(ABSENT|SUSPENDED|FAILED)$ ]]; then
  command=(gcloud compute tpus queued-resources create "$TPU_NAME-queued" "--node-id=$TPU_NAME"
    "${WHERE[@]}" "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION"
    "${network[@]}")
  if is_spot; then command+=(--spot); fi
  if [[ -n "$VALID_UNTIL_DURATION" ]]; then
    command+=("--valid-until-duration=$VALID_UNTIL_DURATION")
  fi
  run "${command[@]}"
fi
if [[ "$DRY_RUN" == 1 ]]; then
  run gcloud compute tpus queued-resources describe "$TPU_NAME-queued" "${WHERE[@]}" \
    "--format=value(state.state)"
  exit 0
fi

waited=0
while state="$(queued_state)"; do
  case "$state" in
    ACTIVE)
      say "$TPU_NAME is there"
      exit 0
      ;;
    FAILED | SUSPENDED | SUSPENDING | DELETING | ABSENT)
      fail "the queued resource $TPU_NAME-queued is $state; why: gcloud compute tpus queued-resources describe $TPU_NAME-queued $(quoted "${WHERE[@]}")"
      ;;
  esac
  ((waited < WAIT_S)) || fail "$TPU_NAME-queued is still $state after $waited s (WAIT_S); the request stays in the queue, delete.sh takes it out"
  say "$TPU_NAME-queued: $state, waited $waited of $WAIT_S s"
  sleep "$POLL_S"
  waited=$((waited + POLL_S))
done
exit 1
