#!/usr/bin/env bash
# Merges two runs of CLINC150 with two of GSM8K in several ways, and measures each merge on both tasks.
#     export CLINC150=... GSM8K=... SMOLLM2=...    as for the configurations smollm2-clinc150 and smollm2-gsm8k
#     bash examples/order_study/tasks.sh
# The runs are those of the first throws of the two studies, which are trained here if they have not been run. Results
# are in runs/tasks-on-clinc150 and runs/tasks-on-gsm8k.
set -euo pipefail

run_study() { # name of the configuration, output folder, more options
    local name=$1 out=$2
    shift 2
    python -m examples.order_study "examples/order_study/configs/$name.yaml" --out "$out" "$@"
}

# Two orders of a study, in a copy of its first throw: what the study has trained and measured is reused.
two_orders=(--set 'throws=[]' --set 'orders=[1, 2]' --set fine_tuning.seed=1 --set 'controls=[ties, dare_ties, ensemble]')
for task in clinc150 gsm8k; do
    if [ -d "runs/smollm2-$task/throw-1" ] && [ ! -d "runs/tasks-on-$task" ]; then
        cp -r "runs/smollm2-$task/throw-1" "runs/tasks-on-$task"
    fi
    run_study "smollm2-$task" "runs/tasks-on-$task" "${two_orders[@]}"
done

mergekit-multi examples/order_study/tasks.yml --intermediate-dir ./runs/tasks

# The first of them is what the others are held against.
others=
for name in one-average one-sum one-ties one-dare-ties one-selection one-resampling \
    all-average all-ties all-dare-ties all-selection all-resampling \
    averages-sum averages-ties selections-ties selections-selection selections-resampling; do
    others+="other-$name: ./runs/tasks/$name, "
done
for task in clinc150 gsm8k; do
    that=$([ "$task" = gsm8k ] && echo clinc150 || echo gsm8k)
    of_that="other-run-of-$that: ./runs/tasks-on-$that/models/order-1"
    run_study "smollm2-$task" "runs/tasks-on-$task" "${two_orders[@]}" --set "others={$others$of_that}"
done
