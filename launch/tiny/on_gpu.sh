#!/usr/bin/env bash
# Trains the shipped tiny autoencoder and generators on one GPU, each from random weights:
#
#   bash launch/tiny/on_gpu.sh OUT [SECONDS] [--limit N]
#
# OUT gets vae/, mmdit/ (preset tiny) and small/ (preset small), and a sheet and a log of each. It
# takes SECONDS (560): three sevenths for the autoencoder, while processes draw the examples of the
# generators, the rest for both generators at once and their figures. --limit N takes N examples of
# each kind, for a trial. $PYTHON is the interpreter (python3), $BATCHES the pictures of a step of
# the autoencoder and of a generator ("64 256").
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$1
total=${2:-560}
limit=("${@:3}")
python=${PYTHON:-python3}
read -r pictures latents <<< "${BATCHES:-64 256}"
examples=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$examples"' EXIT
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
mkdir -p "$out"

recipe() {
  # Runs a recipe beside the others, with its output in the log NAME.
  local name=$1
  shift
  "$python" "$@" "${limit[@]}" > "$out/$name.log" 2>&1 &
}

minutes_until() { # from now to a second of this script; late or not, something is learnt
  local left=$((($1 - SECONDS) * 1000 / 60))
  left=$((left > 300 ? left : 300))
  printf '%d.%03d' $((left / 1000)) $((left % 1000))
}

report() { # the last line of each log
  echo "-- $SECONDS s"
  tail -qn 1 "$out"/*.log | cut -c 1-160
}

failed() {
  echo "error: $1 failed" >&2
  tail -n 30 "$out/$1.log" >&2
  exit 1
}

recipe vae "$here/pretrain_vae.py" --minutes "$(minutes_until $((total * 3 / 7)))" \
  --batch "$pictures" --out "$out/vae" --sheet "$out/vae.png"
vae=$!
sleep $((total / 10)) # a busy GPU would disturb the choice of the autoencoder's kernels
processes=$(nproc)
recipe examples "$here/mmdit_examples.py" --out "$examples" \
  --processes $((processes > 3 ? processes - 2 : 2))
made=$!
until grep -q '^trained' "$out/vae.log"; do
  kill -0 "$vae" 2> /dev/null || failed vae
  sleep 1
  if ((SECONDS % 15 == 0)); then report; fi
done
wait "$made" || failed examples

generators=()
for pair in tiny:mmdit small:small; do
  name=${pair#*:}
  recipe "$name" "$here/pretrain_mmdit.py" --preset "${pair%:*}" --vae "$out/vae" \
    --examples "$examples" --minutes "$(minutes_until $((total * 8 / 9)))" \
    --batch "$latents" --out "$out/$name" --sheet "$out/$name.png"
  generators+=("$!:$name")
done
while kill -0 "${generators[@]%%:*}" 2> /dev/null; do
  sleep 15
  report
done
wait "$vae" || failed vae
for pair in "${generators[@]}"; do wait "${pair%%:*}" || failed "${pair#*:}"; done
report
