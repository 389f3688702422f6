# shellcheck shell=bash
# What the scripts of this folder share: settings (override them in the environment), --dry-run, and
# how a command is run. Sourced, never started.
#
#     PROJECT=my-project ZONE=my-zone TPU_NAME=policy tpu_scripts/create.sh --dry-run

TPU_NAME="${TPU_NAME:-trimpi}"                  # of the TPU VM; its queued resource is NAME-queued
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-v5p-8}"   # e.g. v5litepod-8, v5p-8, v6e-8
RUNTIME_VERSION="${RUNTIME_VERSION:-}"          # of the VM image; by the accelerator type when empty
PROVISIONING="${PROVISIONING:-on-demand}"       # on-demand, spot, queued, queued-spot
ZONE="${ZONE:-}"                                # there is no default
PROJECT="${PROJECT:-}"                          # gcloud's own default when empty
NETWORK_FLAGS="${NETWORK_FLAGS:-}"              # of create, e.g. --network=NAME --subnetwork=NAME
SSH_FLAGS="${SSH_FLAGS:-}"                      # of gcloud's ssh and scp, e.g. --tunnel-through-iap
REMOTE_DIR="${REMOTE_DIR:-trimpi}"              # on every worker, under the home folder
NFS_SHARE="${NFS_SHARE:-}"                      # HOST:/PATH that setup mounts on every worker
# nolock: locks hold on one host only. NFS 3 would keep the lock of a preempted machine for ever; with
# a share that speaks NFS 4.1 take NFS_OPTIONS=hard,noatime,vers=4.1, where they end by themselves.
NFS_OPTIONS="${NFS_OPTIONS:-hard,noatime,nolock}"
MOUNT_DIR="${MOUNT_DIR:-/mnt/trimpi}"           # where it is mounted; what survives a preemption
RUN_NAME="${RUN_NAME:-train}"                   # names the log and the exit status on the workers
POLL_S="${POLL_S:-30}"                          # seconds between two looks while waiting
WAIT_S="${WAIT_S:-86400}"                       # longest wait for a queued resource, seconds

DRY_RUN="${DRY_RUN:-0}"
# shellcheck disable=SC2034 # used by setup.sh
SOURCE_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
REST=() # the arguments that are none of ours

# shellcheck disable=SC2034 # used by watch.sh
EXIT_START_AGAIN=75 # training stopped and saved itself; the same command continues it

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

# usage_error TEXT: exit status 2, as argument parsers do
usage_error() {
  say "error: $*"
  exit 2
}

# parse_arguments "$@": takes --dry-run and --help; leaves the rest in REST
parse_arguments() {
  while (($#)); do
    case "$1" in
      --dry-run) DRY_RUN=1 ;;
      -h | --help)
        # the comment at the top of the script is its help
        awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
        exit 0
        ;;
      --)
        shift
        REST+=("$@")
        return
        ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
}

# no_arguments: for scripts that take none
no_arguments() {
  ((${#REST[@]} == 0)) || usage_error "unknown arguments: ${REST[*]} (--help says what there is)"
}

# quoted COMMAND...: the command as a shell reads it
quoted() {
  local argument text=""
  for argument in "$@"; do
    if [[ "$argument" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      text+=" $argument"
    else
      text+=" ${argument@Q}"
    fi
  done
  printf '%s\n' "${text# }"
}

# run COMMAND...: prints the exact command; runs it, unless --dry-run
run() {
  if [[ "$DRY_RUN" == 1 ]]; then
    quoted "$@"
  else
    say "+ $(quoted "$@")"
    "$@"
  fi
}

need_program() {
  [[ "$DRY_RUN" == 1 ]] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# need_zone: fills WHERE, the flags that say where the TPU is
need_zone() {
  [[ -n "$ZONE" ]] || usage_error "ZONE is not set. Where your quota is: gcloud compute tpus locations list"
  need_program gcloud "https://cloud.google.com/sdk/docs/install"
  WHERE=("--zone=$ZONE")
  [[ -z "$PROJECT" ]] || WHERE+=("--project=$PROJECT")
  read -ra EXTRA_SSH_FLAGS <<<"$SSH_FLAGS"
}

# on_workers WORKER COMMAND: one worker's number, or all; COMMAND is a line of shell
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" "--worker=$1" \
    "${EXTRA_SSH_FLAGS[@]}" "--command=$2"
}

is_queued() { [[ "$PROVISIONING" == queued* ]]; }

is_spot() { [[ "$PROVISIONING" == *spot ]]; }

check_provisioning() {
  case "$PROVISIONING" in
    on-demand | spot | queued | queued-spot) ;;
    *) usage_error "PROVISIONING is on-demand, spot, queued or queued-spot, got '$PROVISIONING'" ;;
  esac
}

# describe KIND NAME FIELD: its state, or ABSENT. What is wrong beside "not found" ends the script: a
# network that is down must never look like a TPU that is gone.
describe() {
  local state errors
  errors="$(mktemp)"
  if state="$(gcloud compute tpus "$1" describe "$2" "${WHERE[@]}" "--format=value($3)" 2>"$errors")"; then
    rm -f "$errors"
    printf '%s\n' "${state:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    rm -f "$errors"
    printf 'ABSENT\n'
  else
    say "$(cat "$errors")"
    rm -f "$errors"
    say "error: gcloud could not say how $2 is (above)"
    return 1
  fi
}

tpu_state() { describe tpu-vm "$TPU_NAME" state; }

queued_state() { describe queued-resources "$TPU_NAME-queued" state.state; }
