#!/usr/bin/env bash
# Runs the accelerator experiments, resuming across short leases of a machine.
#
#   experiments/accelerator.sh MINUTES OUT DATA_DIR [WEIGHTS]
#
# The parts: the speed of the step; on CIFAR-10 and CIFAR-100 the teacher and students
# alone, lambda of every distance on held-out images, and the table of three seeds; with
# WEIGHTS, an ImageNet ResNet18 of torchvision, the paper's recipe. When MINUTES are over,
# the running part saves and stops, and the script ends with status 124 (137 if saving
# took more than a minute). The same command resumes; finished parts take seconds.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
ends=$((SECONDS + 60 * $1)) out=$2 data=$3 weights=${4:-}

run() {
  local left=$((ends > SECONDS ? ends - SECONDS : 1))
  timeout --foreground -s TERM -k 60 "$left" python "$@"
}

distances=(w2 cw2 jw2 w2_gaussian cw2_gaussian kl_gaussian kd l2 procrustes)
# The strong recipe with a third of its epochs.
short=(--recipe strong --dtype bfloat16 --epochs 30 --teacher-epochs 30 --eval-every 5)
mkdir -p "$out"
# Its last rows say so if there was no time for them.
if ! grep -q claims "$out/step.json" 2>/dev/null ||
    grep -q "out of time" "$out/step.json"; then
  run "$here/../benchmarks/step.py" --no-assert --minutes "$(($1 > 1 ? $1 - 1 : 1))" \
    --json "$out/step.json"
fi
for name in cifar10 cifar100; do
  settings=(--dataset "$name" --data-dir "$data" "${short[@]}")
  alone=(--seeds 0 1 2 --out "$out/$name" --distances)
  run "$here/cifar.py" "${settings[@]}" "${alone[@]}"
  run "$here/choose_weights.py" -- "${settings[@]}" --seeds 0 1 \
    --epochs 10 --held-out 5000 --teacher-saw-held-out \
    --teacher "$out/$name/teacher/seed0" --out "$out/$name-weights" \
    --distances "${distances[@]}"
  chosen=$(python -c 'import json, sys
rows = [row for row in json.load(open(sys.argv[1]))["chosen"] if row["accuracy"]]
pairs = ("{name} {weight:g}".format(**row) for row in rows)
print(*(row["name"] for row in rows), "--weights", *pairs)' \
    "$out/$name-weights/weights.json")
  # shellcheck disable=SC2086  # words
  run "$here/cifar.py" "${settings[@]}" "${alone[@]}" $chosen
done
if [ -n "$weights" ]; then
  # After the paper's 15 epochs a grown ResNet34 is no better than the ResNet18 that it
  # was grown from, so this teacher trains for 60.
  run "$here/cifar.py" --dataset cifar10 --data-dir "$data" --recipe paper \
    --teacher-epochs 60 --pretrained-teacher "$weights" --pretrained-student "$weights" \
    --seeds 0 1 2 --out "$out/paper"
fi
