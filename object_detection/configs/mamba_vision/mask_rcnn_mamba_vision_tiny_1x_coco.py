_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/mamba_vision.py",
    "../_base_/coco_instance_multi_scale.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.mamba_vision.tiny), neck=dict(in_channels=[80, 160, 320, 640]))
