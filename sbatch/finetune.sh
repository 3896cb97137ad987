#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Submit from the repository root, where .venv is; options of finetune.py replace those below:
#   sbatch sbatch/finetune.sh --data /scratch/oxe --out runs/finetune_1
#   sbatch sbatch/finetune.sh --data /scratch/oxe --resume runs/finetune_1/last.pt
# Copy datasets to a disk near the GPUs first: read from a bucket they cannot feed four of them.
# Slurm's SIGTERM leaves a checkpoint; torchrun gives its processes 110 s for it.
set -euo pipefail
source .venv/bin/activate
exec torchrun --standalone --nproc_per_node=4 --shutdown-timeout=110 finetune.py \
  --mix bridge --init runs/vla/stage2 --chunk 50 --head-width 1024 \
  --batch-size 256 --steps 20000 --final-lr 0.025 --grad-clip 10 --dtype bfloat16 --wandb "$@"
