#!/usr/bin/env bash
# The whole loop on Meta-World, CPU only: record video, learn latent actions, pretrain on them,
# fine-tune policies that differ in one thing, measure them in closed loop. `DEMO=smoke` runs
# the same commands at throw-away size. Finished steps are skipped when run again, an interrupted
# one starts over, but for rollouts, which go on; delete a step's folder to repeat it.
set -euo pipefail
cd "$(dirname "$0")/.."
source sbatch/env.sh

if [ "${DEMO:-full}" = smoke ]; then
  OUT=runs/smoke EPISODES=4 LAQ=8 VLA=8 FINETUNE=8 ROLLOUTS=1 MAX_STEPS=60
  TRAIN="--data $OUT/data --overwrite --eval-batches 1"
  TASKS="--tasks drawer-open faucet-close"
else
  OUT=runs/demo EPISODES=30 LAQ=600 VLA=600 FINETUNE=400 ROLLOUTS=20 MAX_STEPS=200
  TRAIN="--data $OUT/data --overwrite"
  TASKS=""
fi
mkdir -p "$OUT"

step() { # step NAME RESULT COMMAND...: runs the command unless RESULT is there
  local name=$1 result=$2
  shift 2
  if [ -e "$result" ]; then echo "== $name: done, $result"; return; fi
  echo "== $name ($((SECONDS / 60)) min $((SECONDS % 60)) s so far)"
  "$@"
}

step "record scripted experts" $OUT/data/metaworld_corner4/1.0.0 \
  python rollout.py --record --data $OUT/data --episodes $EPISODES $TASKS
step "latent action quantizer" $OUT/laq/laq.pt2 \
  python laq.py $TRAIN --out $OUT/laq --steps $LAQ --eval-every $LAQ
step "control: random quantizer" $OUT/laq_random/laq.pt2 \
  python laq.py $TRAIN --out $OUT/laq_random --steps 0

declare -A VIDEO=(                          # what labels the video, in both stages
  [latent]="--laq-ckpt $OUT/laq/laq.pt2 --targets vectors"
  [random]="--laq-ckpt $OUT/laq_random/laq.pt2 --targets codes"
  [pooled]="--laq-ckpt pooled --targets vectors"
  [oracle]="--mode actions")
for arm in latent random pooled oracle; do
  step "pretrain: $arm" $OUT/vla_$arm/stage2/manifest.json \
    python vla.py $TRAIN ${VIDEO[$arm]} --out $OUT/vla_$arm --steps $VLA --eval-every $VLA
done

declare -A POLICY=(
  [latent]="--init $OUT/vla_latent/stage2 ${VIDEO[latent]} --episodes-per-task 2"
  [none]="--init none --episodes-per-task 2"
  [random]="--init $OUT/vla_random/stage2 ${VIDEO[random]} --episodes-per-task 2"
  [pooled]="--init $OUT/vla_pooled/stage2 ${VIDEO[pooled]} --episodes-per-task 2"
  [oracle]="--init $OUT/vla_oracle/stage2 --episodes-per-task 0")
for arm in latent none random pooled oracle; do
  step "fine-tune: $arm" $OUT/$arm/policy/manifest.json \
    python finetune.py $TRAIN ${POLICY[$arm]} --out $OUT/$arm --no-use-state \
    --steps $FINETUNE --eval-every $FINETUNE
done

echo "== roll out ($((SECONDS / 60)) min $((SECONDS % 60)) s so far)"
python rollout.py --policy $OUT/{latent,none,random,pooled,oracle} --out $OUT/rollout --resume \
  --episodes $ROLLOUTS --max-steps $MAX_STEPS --seed 1 $TASKS     # on seed 0 choices were made
echo "latent = video labelled by the learned latent actions; none = no video; random = a random
quantizer's codes; pooled = pooled pixel differences, nothing learned; oracle = true actions of all
video. Others: 2 demonstrations a task. $FINETUNE iterations, one training seed.
pictures: $OUT/laq/pairs.png, videos: $OUT/rollout/report.html, for machines: $OUT/rollout/table.json
$((SECONDS / 60)) min $((SECONDS % 60)) s"
