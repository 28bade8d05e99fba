#!/usr/bin/env bash
# Runs the accelerator experiments, resuming across short leases of a machine.
#
#   experiments/accelerator.sh MINUTES OUT DATA_DIR [WEIGHTS]
#
# The parts: the speed of the step; on CIFAR-10 and CIFAR-100 the teacher, the learning
# rates of students alone and distilled, lambda of every distance on held-out images, and
# three seeds with what was chosen; with WEIGHTS, an ImageNet ResNet18 of torchvision, the
# paper's recipe. kddm report OUT/cifar10-[0-9]* joins their tables. When MINUTES are over,
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
  teacher=(--teacher "$out/$name/teacher/seed0")
  run "$here/cifar.py" "${settings[@]}" --seeds 0 --out "$out/$name" \
    --no-equal-compute --distances
  run "$here/choose_weights.py" --rates 0.03 0.1 0.3 -- "${settings[@]}" --seeds 0 1 \
    --epochs 10 --held-out 5000 --teacher-saw-held-out \
    "${teacher[@]}" --out "$out/$name-weights" \
    --distances "${distances[@]}"
  # A line for the student alone, and one for each learning rate and normalization.
  chosen=$(python -c 'import json, sys
print(*json.load(open(sys.argv[1]))["options"], sep="\n")' \
    "$out/$name-weights/weights.json")
  mapfile -t lines <<< "$chosen"
  for i in "${!lines[@]}"; do
    # shellcheck disable=SC2206  # words
    words=(${lines[i]})
    longer=()  # the first line trains all students alone
    if [ "$i" != 0 ]; then longer=(--no-equal-compute); fi
    run "$here/cifar.py" "${settings[@]}" "${teacher[@]}" --seeds 0 1 2 \
      --out "$out/$name-$i" "${longer[@]}" "${words[@]}"
  done
done
if [ -n "$weights" ]; then
  # After the paper's 15 epochs a grown ResNet34 is no better than the ResNet18 that it
  # was grown from, so this teacher trains for 60.
  run "$here/cifar.py" --dataset cifar10 --data-dir "$data" --recipe paper \
    --teacher-epochs 60 --pretrained-teacher "$weights" --pretrained-student "$weights" \
    --seeds 0 1 2 --out "$out/paper"
fi
