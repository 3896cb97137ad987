#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-vla
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Submit from the repository root, where .venv is; options of vla.py replace those below:
#   sbatch sbatch/vla.sh --data /scratch/oxe --out runs/vla_1
#   sbatch sbatch/vla.sh --data /scratch/oxe --resume runs/vla_1/last.pt
# Copy datasets to a disk near the GPUs first: read from a bucket they cannot feed four of them.
# Slurm's SIGTERM leaves a checkpoint; torchrun gives its processes 110 s for it.
set -euo pipefail
source .venv/bin/activate
exec torchrun --standalone --nproc_per_node=4 --shutdown-timeout=110 vla.py \
  --mix bridge,fractal20220817_data --resize gpu --laq-ckpt runs/laq/laq.pt2 \
  --trunk HuggingFaceTB/SmolVLM2-500M-Video-Instruct --head-width 1024 --head-depth 4 \
  --batch-size 256 --steps 30000 --final-lr 0.025 --grad-clip 10 --dtype bfloat16 --wandb "$@"
