#!/usr/bin/env bash
# Trains a tiny Query-Kontext through its three stages on the embedded pictures, paints with it,
# exports it to PyTorch and leaves report.html; `--help` lists the options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh"
ensure_venv "$root" core
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TOKENIZERS_PARALLELISM=false
exec "$root/.venv/bin/python" "$root/launch/quickstart.py" "$@"
