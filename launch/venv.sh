# shellcheck shell=bash
# Sourced by the scripts beside it: `ensure_venv ROOT core|test|check` makes ROOT/.venv and installs
# qk_jax into it, with the extra of that name; each has what the one before it has. Installs again
# only when setup.py or the constraints have changed.

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
  local root=$1 kind=$2 venv=$1/.venv digest python what=$1 enough=$2 installed
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return
    echo "making $venv with $python"
    make_venv "$python" "$venv" || return
  fi
  digest=$("$venv/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(b"".join(open(p, "rb").read() for p in sys.argv[1:])).hexdigest())' \
    "$root/setup.py" "$root/launch/constraints.txt")
  case $kind in
    core) enough="core test check" ;;
    test) enough="test check" ;;
  esac
  for installed in $enough; do
    if [ "$(cat "$venv/.qk-$installed" 2>/dev/null)" = "$digest" ]; then return 0; fi
  done
  if [ "$kind" != core ]; then what="${root}[$kind]"; fi
  echo "installing $what into $venv (some minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --no-input --root-user-action=ignore \
    -c "$root/launch/constraints.txt" -e "$what" || {
    echo "error: pip could not install $what; its last lines say why" >&2
    return 2
  }
  echo "$digest" > "$venv/.qk-$kind"
}
