#!/usr/bin/env bash
# Installs the test extras into .venv and runs the suite in two processes, or in NUMBER with
# `-n NUMBER`; arguments go to pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh"
ensure_venv "$root" test
cd "$root"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
