#!/usr/bin/env bash
# What every change must pass before the tests: lint, format, types, the order of imports, scripts, and
# the site of docs/, whose links must lead somewhere.
# Changes nothing; every check runs, whatever the ones before it found.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh"
ensure_venv "$root" check
cd "$root"
failed=""

check() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed="$failed $name"
}

check lint .venv/bin/ruff check
check format .venv/bin/ruff format --check
check types .venv/bin/mypy
check imports .venv/bin/python -m pytest --quiet tests/test_house.py
check scripts .venv/bin/shellcheck --external-sources .ci/run launch/*.sh launch/tpu_vm/*.sh
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Not --quiet, with which --strict sees no warning.
check site env NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --config-file launch/docs/mkdocs.yml \
  --site-dir "$site"
if [ -n "$failed" ]; then
  echo "error: failed:$failed" >&2
  exit 1
fi
