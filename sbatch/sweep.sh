#!/usr/bin/env bash
# A stage over settings and seeds, as a job array; then, at any time, the table of its results:
#   SETTINGS="--lr 1e-3; --lr 3e-4" SEEDS="0 1 2" \
#     bash sbatch/sweep.sh vla runs/rates --nodes=1 -- --data /scratch/oxe
#   python3 sbatch/sweep.py runs/rates
# Before -- stand options of sbatch, after it those of all runs. Run again, it continues the runs.
set -euo pipefail
stage=$1 out=$2 slurm=()
shift 2
while [ "${1:---}" != -- ]; do slurm+=("$1"); shift; done
mkdir -p "$out"
IFS=';' read -ra settings <<<"${SETTINGS:- }"
for i in "${!settings[@]}"; do
  for seed in ${SEEDS:-0}; do
    echo "${settings[$i]} --seed $seed --out $out/${i}_seed$seed"
  done
done >"$out/runs.txt"
export SWEEP=$out/runs.txt
sbatch --array="0-$(($(wc -l <"$SWEEP") - 1))" "${slurm[@]}" "sbatch/$stage.sh" "${@:2}"
