#!/usr/bin/env bash
# Score on all GPUs of this machine, or under Slurm. Arguments are passed on to test.py;
# mambavision/running/launch.sh describes the environment variables.
#   bash tools/test.sh configs/mamba_vision/mamba_vision_160k_ade20k-512x512_tiny.py tiny.pth
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ../mambavision/running/launch.sh
launch tools/test.py "$@"
