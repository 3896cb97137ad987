#!/usr/bin/env bash
#SBATCH --job-name=nanolapa-vla
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Submit from the repository root, where .venv is: sbatch sbatch/vla.sh. DATA: folder or bucket of NAME/VERSION datasets.
# Slurm's SIGTERM leaves a checkpoint; submit again with RESUME=runs/vla/last.pt to go on. More nodes: start one torchrun
# a node with srun and --rdzv-endpoint.
set -euo pipefail
source .venv/bin/activate
DATA=${DATA:-gs://gresearch/robotics}
exec torchrun --standalone --nproc_per_node=4 vla.py --data "$DATA" --mix "${MIX:-bridge,fractal20220817_data}" --resize gpu --laq-ckpt runs/laq/laq.pt2 \
  --trunk HuggingFaceTB/SmolVLM2-500M-Video-Instruct --head-width 1024 --head-depth 4 --batch-size 256 --steps 30000 \
  --warmup-steps 1000 --lr 1e-4 --min-lr 2.5e-6 --grad-clip 10 --dtype bfloat16 --wandb ${RESUME:+--resume "$RESUME"}
