#!/usr/bin/env bash
# Score on GPUS GPUs of each machine; the environment variables are described in mambavision/running/dist.sh.
#   bash tools/dist_test.sh configs/vmamba/mask_rcnn_vssm_fpn_coco_tiny.py tiny.pth 8
source "$(dirname "${BASH_SOURCE[0]}")/../../mambavision/running/dist.sh"
distribute test.py "CONFIG CHECKPOINT" "$@"
