#!/usr/bin/env bash
# LeRobot's own tools on what this project makes, and its data in: makes LeRobot's environment
# (Python 3.12, gigabytes) in .lerobot or $LEROBOT_ENV if it is not there, and runs tests/plugin.py
# in it, offline. --environment: only makes it; exits with 1 where it cannot be made.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${LEROBOT_ENV:-$PWD/.lerobot}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline TQDM_DISABLE=1 MUJOCO_GL=egl

if [ ! -e "$environment/complete" ]; then
  for python in python3.12 python3.13 ~/.pyenv/versions/3.1[23]*/bin/python none; do
    "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
  done
  [ "$python" != none ] || { echo "LeRobot needs Python 3.12; there is none here" >&2; exit 1; }
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check uv
  # its metaworld names no version of mujoco, whose 4 that cannot use
  "$environment/bin/uv" pip install --quiet --python "$environment/bin/python" \
    'lerobot[training,evaluation,transformers-dep,pusht,metaworld]==0.6.1' mujoco==3.3.0 \
    tyro==1.0.17 pytest==9.2.0
  touch "$environment/complete"
fi
if [ "${1:-}" = --environment ]; then exit; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source sbatch/env.sh
tiny="--data $work/data --mix pushes --batch-size 8 --eval-batches 1 --eval-every 1000"
"$environment/bin/python" tests/lerobot_record.py --root "$work/source" --episodes 6
python data_oxe.py from-lerobot --source "$work/source" --name pushes --data "$work/data" --size 96
python laq.py $tiny --out "$work/laq" --steps 20
python vla.py $tiny --out "$work/vla" --laq-ckpt "$work/laq/laq.pt2" --steps 10
python finetune.py $tiny --out "$work/ft" --init "$work/vla/stage2" --steps 20
"$environment/bin/uv" pip install --quiet --python "$environment/bin/python" \
  --reinstall-package lerobot_policy_nanolapa "$work/ft/policy/lerobot"
NANOLAPA_WORK=$work NANOLAPA_PYTHON=$(command -v python) \
  "$environment/bin/python" -m pytest tests/plugin.py -q -p no:cacheprovider --noconftest --durations=5
