#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-laq
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Submit from the repository root, where .venv is: sbatch sbatch/laq.sh. DATA: folder or bucket of NAME/VERSION datasets,
# MIX: which of them.
# Slurm's SIGTERM leaves a checkpoint; submit again with RESUME=runs/laq/last.pt to go on. More nodes: start one torchrun
# a node with srun and --rdzv-endpoint.
set -euo pipefail
source .venv/bin/activate
DATA=${DATA:-gs://gresearch/robotics}
exec torchrun --standalone --nproc_per_node=4 laq.py --data "$DATA" --mix "${MIX:-bridge,fractal20220817_data}" --resize gpu \
  --size base --batch-size 512 --steps 50000 --warmup-steps 1000 --lr 1e-4 --shift 12 --crop 0.1 --color 0.1 --dtype bfloat16 \
  --compile --wandb ${RESUME:+--resume "$RESUME"}
