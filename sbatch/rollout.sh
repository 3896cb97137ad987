#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-rollout
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Stage 4, success in closed loop; the GPU renders and runs the policies. A job that comes back goes
# on. Submit from the repository root, where .venv is; options of rollout.py replace those below:
#   sbatch sbatch/rollout.sh --policy learned=runs/a0,runs/a1 none=runs/b --out runs/rollout_1
set -euo pipefail
source sbatch/slurm.sh
launch rollout.py --resume --episodes 50 "$@"
