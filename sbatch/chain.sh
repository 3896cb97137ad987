#!/usr/bin/env bash
# All stages and the rollout as four jobs, each of which waits for success of the one before:
#   bash sbatch/chain.sh runs/large --nodes=4 -- --data /scratch/oxe --wandb
# Before -- stand options of sbatch, after it those of all three training stages. LAQ, VLA, FINETUNE
# and ROLLOUT hold options of one stage: LAQ="--steps 200000 --mix oxe29".
set -euo pipefail
out=$1 slurm=() after=""
shift
while [ "${1:---}" != -- ]; do slurm+=("$1"); shift; done

submit() { # submit STAGE OPTION...
  local stage=$1
  shift
  after=$(sbatch --parsable "${slurm[@]}" ${after:+"--dependency=afterok:$after"} \
    --kill-on-invalid-dep=yes "sbatch/$stage.sh" --out "$out/$stage" "$@")
  echo "$stage: job $after"
}

submit laq "${@:2}" ${LAQ:-}
submit vla --laq-ckpt "$out/laq/laq.pt2" "${@:2}" ${VLA:-}
submit finetune --init "$out/vla/stage2" --laq-ckpt "$out/laq/laq.pt2" "${@:2}" ${FINETUNE:-}
submit rollout --policy "$out/finetune/policy" ${ROLLOUT:-}
