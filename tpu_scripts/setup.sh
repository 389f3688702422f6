#!/usr/bin/env bash
# Installs this commit on every worker of the TPU VM: the same files, the same versions.
#
#     ZONE=... [NFS_SHARE=10.0.0.2:/share] tpu_scripts/setup.sh [--dry-run]
#
# Settings: TPU_NAME ZONE PROJECT SSH_FLAGS REMOTE_DIR NFS_SHARE NFS_OPTIONS MOUNT_DIR PYTHON_VERSION EXTRAS
# ALLOW_UNCOMMITTED (1 = install the last commit although the working tree has changes)
#
# TPU VM images bring an older Python than this package needs; `uv` fetches one.
set -euo pipefail

PYTHON_VERSION="${PYTHON_VERSION:-3.12}"
EXTRAS="${EXTRAS:-tpu}" # of pyproject.toml, e.g. tpu,gta
ALLOW_UNCOMMITTED="${ALLOW_UNCOMMITTED:-0}"

# shellcheck source=tpu_scripts/settings.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"
no_arguments
need_zone

commit="$(git -C "$SOURCE_DIR" rev-parse HEAD)" || fail "$SOURCE_DIR is no git clone"
if [[ "$ALLOW_UNCOMMITTED" != 1 && -n "$(git -C "$SOURCE_DIR" status --porcelain)" ]]; then
  problem="the working tree has uncommitted changes, which would not be installed; commit them or set ALLOW_UNCOMMITTED=1"
  [[ "$DRY_RUN" == 1 ]] || fail "$problem"
  say "$problem"
fi

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
archive="$scratch/trimpi.tar.gz"
if [[ "$DRY_RUN" == 1 ]]; then
  archive=/tmp/trimpi.tar.gz
fi
run git -C "$SOURCE_DIR" archive --format=tar.gz "--output=$archive" "$commit"

on_workers all "mkdir -p $REMOTE_DIR/runs"
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:$REMOTE_DIR/source.tar.gz" "${WHERE[@]}" \
  --worker=all "${EXTRA_SSH_FLAGS[@]}"
on_workers all "set -eu; cd $REMOTE_DIR; rm -rf source.new; mkdir source.new; tar -xzf source.tar.gz -C source.new; echo $commit > source.new/COMMIT; rm -rf source; mv source.new source"
on_workers all "set -eu; cd $REMOTE_DIR; python3 -m pip install --quiet --user uv; export PATH=\$HOME/.local/bin:\$PATH; [ -x venv/bin/python ] || uv venv --quiet --python $PYTHON_VERSION venv; uv pip install --quiet --python venv/bin/python -e 'source[$EXTRAS]'"
if [[ -n "$NFS_SHARE" ]]; then
  on_workers all "set -eu; mountpoint -q $MOUNT_DIR || { sudo apt-get install -y -q nfs-common; sudo mkdir -p $MOUNT_DIR; sudo mount -t nfs -o $NFS_OPTIONS $NFS_SHARE $MOUNT_DIR; sudo chmod a+rwx $MOUNT_DIR; }"
fi
say "commit $commit is installed on every worker of $TPU_NAME"
