#!/usr/bin/env bash
# Train on all GPUs of this machine, or under Slurm. Arguments are passed on to train.py;
# mambavision/running/launch.sh describes the environment variables.
#   ./train.sh --config configs/mambavision/mambavision_tiny_1k.yaml --data-dir /data/imagenet --tag tiny
#   NODES=2 PARTITION=batch TIME=4:00:00 ./train.sh --config ... --data-dir ... --tag tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ../mambavision/running/launch.sh
launch_training train.py "$@"
