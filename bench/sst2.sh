#!/usr/bin/env bash
# The README's SST-2 table: four ways to train a 3-layer student, three seeds each. Finished rows are left alone, so an
# interrupted run of this script goes on where it stopped.
#   bash bench/sst2.sh MODEL DATA OUTPUT
# MODEL  Hugging Face directory of a 6-layer encoder (all-MiniLM-L6-v2)    DATA  directory with SST-2's train.tsv, dev.tsv
set -euo pipefail
model=$1 data=$2 output=$3
for seed in 0 1 2; do
    for row in finetune kd metadistil metadistil-2; do
        case $row in
            finetune) how=(--method finetune) ;;
            kd) how=(--method kd --teachers "$model") ;;
            metadistil) how=(--method metadistil --teachers "$model") ;;
            metadistil-2) how=(--method metadistil --teachers "$model,$model") ;;
        esac
        [ -e "$output/$row-$seed/summary.json" ] ||
            python -m engine.train "${how[@]}" --student "$model" --student-layers 1,3,5 --data "$data" \
                --train-size 10000 --prepare-epochs 2 --epochs 2 --precision bf16 --teacher-seed 0 --seed "$seed" \
                --output "$output/$row-$seed"
    done
done
