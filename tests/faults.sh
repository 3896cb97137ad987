#!/usr/bin/env bash
# Kills each stage twenty times, at random moments and while it writes checkpoints: half an hour. Tells
# the steps that it hit.
set -euo pipefail
cd "$(dirname "$0")/.."
source sbatch/env.sh
KILLS=20 OMP_NUM_THREADS=1 exec python -m pytest tests/test_faults.py -q -rP "$@"
