#!/usr/bin/env bash
# How much a labelled episode is worth: success over demonstrations and over iterations, with and
# without video, clean and distracted, beside controls. CPU or GPU.
#
#   bash sbatch/label_efficiency.sh                        # all of it, a process a core
#   bash sbatch/label_efficiency.sh --smoke                # the same commands at throw-away size
#   ARMS="learned none" SEEDS=0 DEMOS=2 bash sbatch/label_efficiency.sh         # a part of it
#   sbatch --array=0-63 sbatch/label_efficiency.sh         # spread over a cluster; then --table
#   bash sbatch/label_efficiency.sh --table                # of what is finished
#
# Finished steps are skipped, so a killed run goes on when started again. Writes OUT/table.md,
# OUT/results.csv and OUT/success.png. Evaluates on --seed 1, as settings were chosen on --seed 0.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source sbatch/env.sh

OUT=${OUT:-runs/label_efficiency}
ARMS=${ARMS:-learned codes labelled random pooled permuted frame oracle none blind}
VIDEOS=${VIDEOS:-0 50}                      # --distract of recordings and evaluations, percent
TASKSETS=${TASKSETS:-six other}
SEEDS=${SEEDS:-0 1 2}                       # of quantizer and pretraining
FINETUNE_SEEDS=${FINETUNE_SEEDS:-0 1}
DEMOS=${DEMOS:-1 2 5}                       # labelled episodes a task; the oracle has all
ITERATIONS=${ITERATIONS:-0 100 200 400 800 1600}
EPISODES=${EPISODES:-30} LAQ=${LAQ:-600} VLA=${VLA:-600} ROLLOUTS=${ROLLOUTS:-50} MAX_STEPS=200
TRAIN="--overwrite --save-every 1000000"
if [ "${1:-}" = --smoke ]; then
  OUT=runs/label_efficiency_smoke ARMS="learned labelled permuted oracle none" SEEDS=0
  FINETUNE_SEEDS=0 DEMOS=2 ITERATIONS="0 8" TASKSETS=two VIDEOS=50 EPISODES=4 LAQ=8 VLA=8 ROLLOUTS=1
  MAX_STEPS=40 TRAIN="$TRAIN --eval-batches 1"
fi
mkdir -p "$OUT"

declare -A TASKS=(
  [two]="drawer-open faucet-close"
  [six]="button-press-topdown drawer-open window-open door-open faucet-open faucet-close"
  [other]="button-press drawer-close window-close door-close plate-slide coffee-button")

once() { # once RESULT COMMAND...: runs it unless RESULT is there; another process may be at it
  local result=$1 log
  shift
  log="$OUT/logs/$(tr / _ <<<"${result#"$OUT"/}").log"
  mkdir -p "$OUT/logs"
  (
    flock 9
    [ -e "$result" ] && exit 0
    echo "$(date +%T) $result"
    "$@" >"$log" 2>&1 || { echo "failed, see $log" >&2; exit 1; }
  ) 9>"$log.lock"
}

unit() { # unit PERCENT TASKSET ARM SEED: all of one arm and one pretraining seed
  local percent=$1 taskset=$2 arm=$3 seed=$4
  local home=$OUT/$taskset$percent world=metaworld_corner4 distract
  distract=$((percent / 100)).$(printf %02d $((percent % 100)))
  [ "$percent" = 0 ] || world=${world}_distract$percent
  local data="--data $home/data --mix $world $TRAIN" stage=$home/$arm$seed
  once "$home/data/$world/1.0.0" python rollout.py --record --data "$home/data" \
    --episodes $EPISODES --distract "$distract" --tasks ${TASKS[$taskset]}

  local quantizer=laq$seed options="" video="" init=$stage/vla/stage2
  case $arm in
    labelled) quantizer=laq_labelled$seed options="--action-fraction 0.03" ;;
    random) quantizer=laq_random$seed LAQ=0 ;;
    learned | codes | pooled | permuted | frame | oracle | none | blind) ;;
    *) echo "no arm '$arm'; there are: learned codes labelled random pooled permuted frame oracle" \
            "none blind" >&2; return 1 ;;
  esac
  case $arm in
    none | oracle) ;;
    pooled) video="--laq-ckpt pooled --targets vectors" ;;
    *)
      video="--laq-ckpt $home/$quantizer/laq.pt2 --targets vectors"
      once "$home/$quantizer/laq.pt2" python laq.py $data --out "$home/$quantizer" --seed "$seed" \
        --steps "$LAQ" --eval-every $((LAQ + 1)) $options ;;
  esac
  case $arm in codes | random) video=${video/vectors/codes} ;; esac
  local pretrain=$video
  case $arm in
    permuted | frame) pretrain="$video --null $arm" ;;              # of stage 2 alone
    oracle) pretrain="--mode actions" DEMOS=0 ;;
    blind) video="$video --blind" ;;
  esac
  if [ "$arm" = none ]; then
    init=none
  else
    once "$init/manifest.json" python vla.py $data $pretrain --out "$stage/vla" --seed "$seed" \
      --steps "$VLA" --eval-every "$VLA"
  fi

  local demos steps again run
  for demos in $DEMOS; do for steps in $ITERATIONS; do for again in $FINETUNE_SEEDS; do
    run=$stage/demos${demos}_steps${steps}_seed$again
    once "$run/policy/manifest.json" python finetune.py $data --init "$init" $video \
      --out "$run" --seed $((10 * seed + again)) --no-use-state --steps "$steps" \
      --eval-every $((steps + 1)) --episodes-per-task "$demos"
    once "$run/rollout/results.json" python rollout.py --policy "$run/policy" --workers 1 \
      --out "$run/rollout" --distract "$distract" --episodes $ROLLOUTS --max-steps $MAX_STEPS \
      --seed 1 --resume --tasks ${TASKS[$taskset]}
  done; done; done
}

if [ "${1:-}" != --table ]; then
  units=()
  for seed in $SEEDS; do for percent in $VIDEOS; do for taskset in $TASKSETS; do
    for arm in $ARMS; do units+=("$percent $taskset $arm $seed"); done
  done; done; done
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  jobs=${JOBS:-$(nproc)} share=${SLURM_ARRAY_TASK_COUNT:-1} mine=${SLURM_ARRAY_TASK_ID:-0}
  failed=0
  for i in "${!units[@]}"; do
    [ $((i % share)) = $((mine % share)) ] || continue
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || failed=1; done
    unit ${units[$i]} &
  done
  while [ -n "$(jobs -p)" ]; do wait -n || failed=1; done
  if [ $failed = 1 ]; then
    echo "some steps failed; started again, the others are not repeated; --table shows them" >&2
    exit 1
  fi
  [ "$share" = 1 ] || exit 0
fi
python sbatch/label_efficiency.py "$OUT"
