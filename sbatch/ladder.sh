#!/usr/bin/env bash
# Does pretraining learn? From the smallest question to the whole: one batch by heart, one dataset,
# three, the mix, and the mix at other learning rates; each with the same other options of vla.py.
#
#   DATA=/scratch/oxe LAQ=runs/laq/laq.pt2 bash sbatch/ladder.sh -- --steps 2000
#   RUN="torchrun --nproc_per_node=4" bash sbatch/ladder.sh -- --batch-size 256 --dtype bfloat16
#   bash sbatch/ladder.sh --slurm --nodes=1 -- --batch-size 256         # a job array; then --table
#   bash sbatch/ladder.sh --table                          # of what is finished
#   bash sbatch/ladder.sh --smoke                          # tiny, on a CPU: Meta-World, 3 cameras;
#                                                          # with --slurm after it, there
#
# A run that has begun is continued, a finished one skipped. One that fails, as at a rate that is
# too high, does not keep the others from running. Writes OUT/table.md, OUT/ladder.png.
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/.."

smoke=
if [ "${1:-}" = --smoke ]; then smoke=yes OUT=${OUT:-runs/ladder_smoke}; shift; fi
how=${1:-}
if [ "$how" != --slurm ] || [ -n "$smoke" ]; then source sbatch/env.sh; fi      # a cluster has its own
OUT=${OUT:-runs/ladder} DATA=${DATA:-data} LAQ=${LAQ:-runs/laq/laq.pt2}
ONE=${ONE:-bridge} THREE=${THREE:-bridge,fractal20220817_data,droid} MIX=${MIX:-oxe29}
RATES=${RATES:-1e-3 3e-4 1e-4 3e-5}
RUN=${RUN:-python}

slurm=()
while [ "${1:---}" != -- ]; do slurm+=("$1"); shift; done
options=("${@:2}")

if [ -n "$smoke" ]; then
  DATA=$OUT/data LAQ=$OUT/laq/laq.pt2 RATES="3e-4 1e-4"
  ONE=metaworld_corner4 THREE=metaworld_corner4,metaworld_corner,metaworld_topview
  MIX=metaworld_corner4:0.6,metaworld_corner:0.2,metaworld_topview:0.2
  tiny="--batch-size 8 --eval-batches 1 --log-every 1"
  local="--trunk tiny --head-width 256 --dtype float32 --resize cpu --no-wandb"     # not vla.sh's
  options=(--steps 8 --eval-every 4 $tiny $local "${options[@]}")
  for camera in corner4 corner topview; do
    [ -e "$DATA/metaworld_$camera" ] || python rollout.py --record --data "$DATA" --episodes 3 \
      --camera $camera --tasks drawer-open faucet-close
  done
  [ -e "$LAQ" ] || python laq.py --data "$DATA" --mix "$MIX" --out "$OUT/laq" --steps 8 $tiny \
    --overwrite
fi

mkdir -p "$OUT"
settings="--overfit --mix $ONE;--mix $ONE;--mix $THREE;--mix $MIX"
for rate in $RATES; do settings="$settings;--mix $MIX --lr $rate"; done
options=(--data "$DATA" --laq-ckpt "$LAQ" "${options[@]}")
if [ "$how" = --slurm ]; then
  SETTINGS=$settings SEEDS=0 exec bash sbatch/sweep.sh vla "$OUT" "${slurm[@]:1}" -- \
    "${options[@]}"
fi
failed=()
if [ "$how" != --table ]; then
  IFS=';' read -ra settings <<<"$settings"
  for i in "${!settings[@]}"; do                            # as sweep.sh names them
    echo "${settings[$i]} --seed 0 --out $OUT/${i}_seed0"
  done >"$OUT/runs.txt"
  while read -ru 9 line; do
    run=${line##* --out }
    [ -e "$run/stage2/manifest.json" ] && continue
    echo "$(date +%T) $line"
    $RUN vla.py --resume auto $line "${options[@]}" >"$run.log" 2>&1 9<&- \
      || { code=$?; echo "failed, see $run.log" >&2; failed+=("$run"); }
    [ "${code:-0}" -lt 128 ] || exit "$code"                # Ctrl-C, a signal
  done 9<"$OUT/runs.txt"
fi
python sbatch/ladder.py "$OUT"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; the table has their last validations, if any" >&2
  exit 1
fi
