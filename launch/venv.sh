# Sourced by the scripts beside it: `ensure_venv core|test` makes .venv and installs qk_jax into it.
# Nothing is done again while setup.py and the constraints stay as they were at the last install.

find_python() {
  # The first Python 3.11 or 3.12 that works; $PYTHON comes first when set.
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c \
        'import sys; raise SystemExit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "error: no Python 3.11 or 3.12 found; install one, or set PYTHON=/path/to/python3.11" >&2
  return 2
}

make_venv() {
  # Debian ships Python without ensurepip: there the pip of the outer Python installs into .venv.
  local python=$1 venv=$2
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
  elif "$python" -c 'import pip, venv' 2>/dev/null; then
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" --quiet install pip
  else
    echo "error: $python has neither ensurepip nor pip; install python3-venv or pip" >&2
    return 2
  fi
}

ensure_venv() {
  local root=$1 kind=$2 venv=$1/.venv digest python extra=""
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return
    echo "making $venv with $python"
    make_venv "$python" "$venv" || return
  fi
  digest=$("$venv/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(b"".join(open(p, "rb").read() for p in sys.argv[1:])).hexdigest())' \
    "$root/setup.py" "$root/launch/constraints.txt")
  if [ "$(cat "$venv/.qk-$kind" 2>/dev/null)" = "$digest" ]; then return 0; fi
  if [ "$kind" = core ] && [ "$(cat "$venv/.qk-test" 2>/dev/null)" = "$digest" ]; then return 0; fi
  if [ "$kind" = test ]; then extra="[test]"; fi
  echo "installing qk_jax$extra into $venv (some minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --no-input --root-user-action=ignore \
    -c "$root/launch/constraints.txt" -e "$root$extra" || {
    echo "error: pip could not install qk_jax$extra; its last lines say why" >&2
    return 2
  }
  echo "$digest" > "$venv/.qk-$kind"
}
