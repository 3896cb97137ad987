#!/usr/bin/env bash
# The whole loop on Meta-World, CPU only: record video, learn latent actions, pretrain on them,
# fine-tune four policies that differ in one thing, measure them in closed loop. `DEMO=smoke` runs
# the same commands at throw-away size. Finished steps are skipped when run again, an interrupted
# one starts over; delete a step's folder to repeat it.
set -euo pipefail
cd "$(dirname "$0")/.."
source sbatch/env.sh

if [ "${DEMO:-full}" = smoke ]; then
  OUT=runs/smoke EPISODES=4 LAQ=8 VLA=8 FINETUNE=8 ROLLOUTS=1 MAX_STEPS=60
  TRAIN="--data $OUT/data --overwrite --eval-batches 1"
  TASKS="--tasks drawer-open faucet-close"
else
  OUT=runs/demo EPISODES=30 LAQ=600 VLA=600 FINETUNE=200 ROLLOUTS=20 MAX_STEPS=200
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
  python laq.py $TRAIN --out $OUT/laq --steps $LAQ --eval-every $((LAQ / 2))
step "control: random quantizer" $OUT/laq_random/laq.pt2 \
  python laq.py $TRAIN --out $OUT/laq_random --steps 0
for name in "" _random; do
  step "pretrain on the codes of laq$name" $OUT/vla$name/stage2/manifest.json \
    python vla.py $TRAIN --out $OUT/vla$name --laq-ckpt $OUT/laq$name/laq.pt2 \
    --steps $VLA --eval-every $((VLA / 2))
done

declare -A INIT=(
  [latent]="$OUT/vla/stage2" [none]="none" [random]="$OUT/vla_random/stage2"
  [blind]="$OUT/vla/stage2 --blind")
for arm in latent none random blind; do
  step "fine-tune: $arm" $OUT/$arm/policy/manifest.json \
    python finetune.py $TRAIN --init ${INIT[$arm]} --out $OUT/$arm --episodes-per-task 2 \
    --no-use-state --steps $FINETUNE --eval-every $FINETUNE
  step "roll out: $arm" $OUT/$arm/rollout/results.json \
    python rollout.py --policy $OUT/$arm/policy --out $OUT/$arm/rollout \
    --episodes $ROLLOUTS --max-steps $MAX_STEPS $TASKS
done

echo
python rollout.py --out $OUT --compare latent=$OUT/latent/rollout none=$OUT/none/rollout \
  random=$OUT/random/rollout blind=$OUT/blind/rollout
echo "latent = pretrained on the learned latent actions; none = no pretraining; random = pretrained
on a random quantizer's codes; blind = as latent, image black. Each: 2 demonstrations a task,
$FINETUNE iterations, one training seed.
pictures: $OUT/laq/pairs.png, videos: $OUT/latent/rollout/*.gif, for machines: $OUT/results.json
$((SECONDS / 60)) min $((SECONDS % 60)) s"
