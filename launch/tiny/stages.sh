#!/usr/bin/env bash
# Trains the three stages of the shipped tiny model, from the shipped parts and the larger generator
# beside this file:
#
#   bash launch/tiny/stages.sh W [--config.FIELD=VALUE ...]
#   python launch/tiny/ship.py --checkpoint W/stage3
#
# An hour and a half on two quiet cores; the same command resumes. Options are for all three stages.
# $PYTHON is the interpreter (python3).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$1
shift

train() {
  "${PYTHON:-python3}" -m qk_jax.train --config "$1:tiny_long" --workdir "$out" "${@:2}"
}

# launch/tiny/small has 7 blocks of 3 heads; an adapter of rank 8 of the VLM fits into the package.
larger=(--config.model.mmdit.num_layers=7 --config.model.mmdit.num_attention_heads=3)
train stage1 --config.lora.rank=8 --config.lora.alpha=8.0 "$@"
train stage2 "${larger[@]}" --config.init.mmdit="$here/small" "$@"
train stage3 "${larger[@]}" --config.steps=7000 --config.optimizer.lr=1.5e-3 \
  --config.optimizer.ema=0.999 --config.data.tasks.text_to_image=0.12 \
  --config.data.tasks.reconstruction=0.03 --config.data.tasks.transformation=0.15 \
  --config.data.tasks.customization=0.2 "$@"
