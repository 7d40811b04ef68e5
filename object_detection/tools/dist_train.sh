#!/usr/bin/env bash
# Train on GPUS GPUs of each machine; the environment variables are described in mambavision/running/dist.sh.
#   bash tools/dist_train.sh configs/vmamba/mask_rcnn_vssm_fpn_coco_tiny.py 8
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash tools/dist_train.sh CONFIG GPUS [OPTION ...]
source "$(dirname "${BASH_SOURCE[0]}")/../../mambavision/running/dist.sh"
distribute train.py "CONFIG" "$@"
