#!/usr/bin/env bash
# Score on all GPUs of this machine, or under Slurm. Arguments are passed on to test.py;
# mambavision/running/launch.sh describes the environment variables.
#   bash tools/test.sh configs/mamba_vision/cascade_mask_rcnn_mamba_vision_tiny_3x_coco.py tiny.pth
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ../mambavision/running/launch.sh
launch tools/test.py "$@"
