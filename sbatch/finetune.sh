#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Stage 3, a policy with real actions. Submit from the repository root, where .venv is; options
# of finetune.py replace those below:
#   sbatch sbatch/finetune.sh --data /scratch/oxe --out runs/finetune_1
#   sbatch --nodes=4 --time=12:00:00 sbatch/finetune.sh --data /scratch/oxe
# Copy datasets to a disk near the GPUs first: read from a bucket they cannot feed four of them.
# Two minutes before its time is up, or when it is preempted, the run leaves a checkpoint and the
# job goes back to its queue; the same command after a failure continues the run, too.
set -euo pipefail
source sbatch/slurm.sh
launch finetune.py --resume auto \
  --mix bridge --init runs/vla/stage2 --chunk 50 --head-width 1024 \
  --batch-size 256 --steps 20000 --final-lr 0.025 --grad-clip 10 --dtype bfloat16 \
  --keep-every 5000 --wandb "$@"
