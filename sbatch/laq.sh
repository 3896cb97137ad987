#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-laq
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Submit from the repository root, where .venv is; options of laq.py replace those below:
#   sbatch sbatch/laq.sh --data /scratch/oxe --out runs/laq_1
#   sbatch sbatch/laq.sh --data /scratch/oxe --resume runs/laq_1/last.pt
# Copy datasets to a disk near the GPUs first: read from a bucket they cannot feed four of them.
# Slurm's SIGTERM leaves a checkpoint; torchrun gives its processes 110 s for it.
set -euo pipefail
source .venv/bin/activate
exec torchrun --standalone --nproc_per_node=4 --shutdown-timeout=110 laq.py \
  --mix bridge,fractal20220817_data --resize gpu --size base --batch-size 512 --steps 50000 \
  --shift 12 --crop 0.1 --color 0.1 --dtype bfloat16 --compile --wandb "$@"
