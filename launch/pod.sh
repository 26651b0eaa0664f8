#!/usr/bin/env bash
# A stage on a TPU slice, from a settings file: bash launch/pod.sh VERB SETTINGS.toml [--dry-run].
# Installs qk_jax into .venv first, because configs and slices are checked with its own code.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh"
ensure_venv "$root" core
exec "$root/.venv/bin/python" "$root/launch/pod.py" "$@"
