#!/usr/bin/env bash
# Training on TPU slices of a GKE cluster, by a JobSet (jobset.yaml) or by XPK.
#
#     IMAGE=... CLAIM=... tpu_scripts/gke.sh start [--dry-run] -- --config ... --workdir /mnt/trimpi/run
#     tpu_scripts/gke.sh status | log | delete
#     IMAGE=... CLUSTER=... ZONE=... tpu_scripts/gke.sh xpk [--dry-run] -- --config ... --workdir ...
#
# start, status, log and delete need kubectl with the cluster's credentials and JobSet 0.6 or later in
# the cluster; xpk needs XPK, and the workdir's storage attached to its cluster (`xpk storage`). IMAGE is built from tpu_scripts/Dockerfile. What stands after -- goes to
# MODULE. One slice: GKE_ACCELERATOR, GKE_TOPOLOGY, HOSTS_PER_SLICE and CHIPS_PER_HOST belong together.
set -euo pipefail

NAMESPACE="${NAMESPACE:-default}"
IMAGE="${IMAGE:-}"                                   # REGISTRY/NAME:TAG
CLAIM="${CLAIM:-}"                                   # a ReadWriteMany volume claim for MOUNT_DIR
GKE_ACCELERATOR="${GKE_ACCELERATOR:-tpu-v5p-slice}"  # or tpu-v5-lite-podslice, tpu-v6e-slice
GKE_TOPOLOGY="${GKE_TOPOLOGY:-2x2x1}"
HOSTS_PER_SLICE="${HOSTS_PER_SLICE:-1}"
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
GRACE_S="${GRACE_S:-300}"
MODULE="${MODULE:-trimpi_jax.train}"
LINES_SHOWN="${LINES_SHOWN:-50}"
CLUSTER="${CLUSTER:-}"                               # of XPK

scripts="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=tpu_scripts/settings.sh
source "$scripts/settings.sh"
parse_arguments "$@"
action="${REST[0]:-}"
arguments=("${REST[@]:1}")
[[ "$action" =~ ^(start|status|log|delete|xpk)$ ]] || usage_error "start, status, log, delete or xpk, got '$action'"
[[ "$RUN_NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || usage_error "RUN_NAME becomes a name in Kubernetes: small letters, digits and dashes, got '$RUN_NAME'"

# json_list WORDS...: a flow sequence that YAML reads
json_list() {
  local word text=""
  for word in "$@"; do
    word="${word//\\/\\\\}"
    text+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${text#, }"
}

# manifest: jobset.yaml with everything filled in
manifest() {
  local text key
  # shellcheck disable=SC2034 # read by its name below
  ARGUMENTS="$(json_list -u -m "$MODULE" "${arguments[@]}")"
  text="$(<"$scripts/jobset.yaml")"
  for key in RUN_NAME NAMESPACE MAX_RESTARTS HOSTS_PER_SLICE GRACE_S GKE_ACCELERATOR GKE_TOPOLOGY \
    IMAGE CHIPS_PER_HOST MOUNT_DIR CLAIM ARGUMENTS; do
    text="${text//@"$key"@/"${!key}"}"
  done
  printf '%s\n' "$text"
}

case "$action" in
  start)
    [[ -n "$IMAGE" ]] || usage_error "IMAGE is not set; build it from tpu_scripts/Dockerfile"
    [[ -n "$CLAIM" ]] || usage_error "CLAIM is not set: a ReadWriteMany volume claim, which holds the workdir"
    [[ "$MODULE" != trimpi_jax.train || " ${arguments[*]}" =~ \ --workdir[=\ ]$MOUNT_DIR/ ]] ||
      usage_error "give --workdir under MOUNT_DIR=$MOUNT_DIR, where the volume claim is mounted"
    need_program kubectl "https://kubernetes.io/docs/tasks/tools"
    if [[ "$DRY_RUN" == 1 ]]; then
      quoted kubectl create -f - "<<<" "MANIFEST" | sed "s/'<<<' MANIFEST/<<'MANIFEST'/"
      manifest
      echo MANIFEST
    else
      # create, not apply: a run of this name that is still there must not be changed
      manifest | run kubectl create -f -
    fi
    ;;
  status)
    need_program kubectl "https://kubernetes.io/docs/tasks/tools"
    run kubectl get jobset "$RUN_NAME" "--namespace=$NAMESPACE"
    run kubectl get pods "--namespace=$NAMESPACE" "--selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME" -o wide
    ;;
  log)
    need_program kubectl "https://kubernetes.io/docs/tasks/tools"
    run kubectl logs "--namespace=$NAMESPACE" "--selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME" \
      "--tail=$LINES_SHOWN" --prefix
    ;;
  delete)
    need_program kubectl "https://kubernetes.io/docs/tasks/tools"
    run kubectl delete jobset "$RUN_NAME" "--namespace=$NAMESPACE"
    ;;
  xpk)
    [[ -n "$IMAGE" ]] || usage_error "IMAGE is not set; build it from tpu_scripts/Dockerfile"
    [[ -n "$CLUSTER" ]] || usage_error "CLUSTER is not set: the GKE cluster that XPK made"
    [[ -n "$ZONE" ]] || usage_error "ZONE is not set"
    need_program xpk "pip install xpk"
    where=("--zone=$ZONE")
    [[ -z "$PROJECT" ]] || where+=("--project=$PROJECT")
    run xpk workload create "--cluster=$CLUSTER" "--workload=$RUN_NAME" "--tpu-type=$ACCELERATOR_TYPE" \
      --num-slices=1 "--docker-image=$IMAGE" "${where[@]}" "--max-restarts=$MAX_RESTARTS" \
      "--restart-on-exit-codes=$EXIT_START_AGAIN" \
      "--command=$(quoted python -u -m "$MODULE" "${arguments[@]}")"
    ;;
esac
