#!/usr/bin/env bash
# Score on GPUS GPUs of each machine; the environment variables are described in mambavision/running/dist.sh.
#   bash tools/dist_test.sh configs/vmamba/upernet_vssm_4xb4-160k_ade20k-512x512_tiny.py tiny.pth 8
source "$(dirname "${BASH_SOURCE[0]}")/../../mambavision/running/dist.sh"
distribute test.py "CONFIG CHECKPOINT" "$@"
