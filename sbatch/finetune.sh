#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Submit from the repository root, where .venv is: sbatch sbatch/finetune.sh. DATA: folder or bucket of NAME/VERSION datasets.
# Slurm's SIGTERM leaves a checkpoint; submit again with RESUME=runs/finetune/last.pt to go on. More nodes: start one torchrun
# a node with srun and --rdzv-endpoint.
set -euo pipefail
source .venv/bin/activate
DATA=${DATA:-gs://gresearch/robotics}
exec torchrun --standalone --nproc_per_node=4 finetune.py --data "$DATA" --mix bridge --init runs/vla/stage2 --chunk 50 --head-width 1024 --head-depth 4 --batch-size 256 \
  --steps 20000 --warmup-steps 1000 --lr 1e-4 --min-lr 2.5e-6 --grad-clip 10 --dtype bfloat16 --wandb ${RESUME:+--resume "$RESUME"}
