#!/usr/bin/env bash
# Validate on all GPUs of this machine, or under Slurm. Arguments are passed on to validate.py;
# mambavision/running/launch.sh describes the environment variables.
#   ./test.sh --model mamba_vision_T --checkpoint mambavision_tiny_1k.pth.tar --data-dir /data/imagenet
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ../mambavision/running/launch.sh
launch validate.py "$@"
