#!/usr/bin/env bash
# Train on all GPUs of this machine, or under Slurm. Arguments are passed on to train.py;
# mambavision/running/launch.sh describes the environment variables.
#   bash tools/train.sh configs/mamba_vision/cascade_mask_rcnn_mamba_vision_tiny_3x_coco.py
#   NODES=2 PARTITION=batch TIME=4:00:00 bash tools/train.sh CONFIG
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ../mambavision/running/launch.sh
launch_training tools/train.py "$@"
