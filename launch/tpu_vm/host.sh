#!/usr/bin/env bash
# What each host of a TPU VM slice does for launch/pod.py:
#
#   host.sh install FROM WORKDIR     Python, the wheel under the constraints; proves the bucket
#   host.sh copy RECORDS             the records to the disk
#   host.sh mount BUCKET             a bucket at /bucket, read-only
#   host.sh start N N_LINES WORDS    the trainer, as a unit of systemd; N lines of environment first
#   host.sh status | tail LINES | logs LINES | stop
#
# Every line of output begins with the slice and the host.
set -euo pipefail
readonly UV=0.13.8 PYTHON=3.11 UNIT=qk-train GCSFS=2026.10.1 # gcsfs opens gs:// paths
home=$HOME/qk
mkdir -p "$home"

metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
QK_HOST=$(metadata agent-worker-number)
QK_SLICE=$(metadata tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
QK_SLICE=${QK_SLICE:-0}
label="[slice $QK_SLICE host $QK_HOST]"

say() { echo "$label $*"; }
fail() {
  say "error: $*"
  exit 1
}
quietly() { # a command whose output is only shown when it fails
  "$@" >"$home/command.log" 2>&1 || fail "$* failed: $(command tail -n 3 "$home/command.log" | tr '\n' ' ')"
}

install() {
  local from=$1 workdir=$2
  # Before anything else: what cannot be written now cannot be saved in an hour.
  if ! date | gcloud storage cp --quiet - "$workdir/launch/hosts/$QK_SLICE-$QK_HOST" \
      >"$home/command.log" 2>&1; then
    fail "$workdir cannot be written from here; give the slice's service account" \
      "roles/storage.objectUser on the bucket, and the slice the scope cloud-platform"
  fi
  if [ "$(cat "$home/installed" 2>/dev/null)" != "$from" ]; then
    quietly gcloud storage cp --quiet "$from/*" "$home/"
    # The image's own Python is too old; uv brings one.
    quietly python3 -m pip install --user --quiet "uv==$UV"
    quietly python3 -m uv venv --quiet --clear --python "$PYTHON" "$home/.venv"
    quietly python3 -m uv pip install --quiet --python "$home/.venv/bin/python" \
      --constraint "$home/constraints.txt" "$(echo "$home"/qk_jax-*.whl)[tpu]" "gcsfs==$GCSFS"
    echo "$from" >"$home/installed"
  fi
  say installed
}

copy() {
  local needed free
  needed=$(gcloud storage du --summarize "$1" | awk '{print int($1 / 1024)}')
  free=$(($(df --output=avail -k "$home" | command tail -n 1) + $(du -sk "$home/records" 2>/dev/null | cut -f1 || echo 0)))
  [ "$needed" -lt "$free" ] || fail "the records have $needed KiB and the disk $free; give data = \"mount\""
  mkdir -p "$home/records"
  quietly gcloud storage rsync --quiet --recursive "$1" "$home/records"
  say copied
}

mount() {
  if ! command -v gcsfuse >/dev/null; then
    local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    curl --silent --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" \
      | sudo tee "$list" >/dev/null
    quietly sudo apt-get update -qq
    quietly sudo apt-get install -qq gcsfuse
  fi
  sudo mkdir -p /bucket
  sudo chown "$USER" /bucket
  mountpoint -q /bucket || quietly gcsfuse -o ro --implicit-dirs "$1" /bucket
  say mounted
}

start() {
  local count=$1
  shift
  printf '%s\n' "${@:1:count}" "QK_SLICE=$QK_SLICE" "QK_HOST=$QK_HOST" >"$home/run.env"
  shift "$count"
  printf '%q ' exec "$home/.venv/bin/python" "$home/supervise.py" "$@" >"$home/run.sh"
  sed -e "s|@USER@|$USER|" -e "s|@HOME@|$HOME|" "$home/$UNIT.service" \
    | sudo tee "/etc/systemd/system/$UNIT.service" >/dev/null
  echo "--- start, $(date)" >>"$home/train.log"
  rm -f "$home/stopped"
  sudo systemctl daemon-reload
  quietly sudo systemctl restart "$UNIT"
  say started
}

status() { # absent, running, stopped by us, or exited and the status
  local ActiveState=inactive SubState=dead ExecMainCode=0 ExecMainStatus=0 line
  while read -r line; do local "${line?}"; done < <(
    systemctl show "$UNIT" --property=ActiveState,SubState,ExecMainCode,ExecMainStatus
  )
  local stopped=/
  [ ! -e "$home/stopped" ] || stopped=/stopped/
  case $ActiveState/$SubState$stopped$ExecMainCode in
    active/running/* | activating/* | deactivating/* | reloading/*) say running ;;
    */stopped/*) say stopped ;;
    */0) say absent ;;
    */[23]) say "exited $((128 + ExecMainStatus))" ;; # the supervisor itself was killed
    *) say "exited $ExecMainStatus" ;;
  esac
}

tail() { command tail -n "$@" "$home/train.log" 2>/dev/null | sed -u "s/^/$label /"; }
logs() { tail "$1" -F; }

stop() {
  touch "$home/stopped"
  sudo systemctl stop "$UNIT" 2>/dev/null || true
  say stopped
}

"$@"
