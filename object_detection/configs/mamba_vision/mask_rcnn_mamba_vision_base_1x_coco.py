_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/mamba_vision.py",
    "../_base_/coco_instance_multi_scale.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.mamba_vision.base), neck=dict(in_channels=[128, 256, 512, 1024]))

optim_wrapper = dict(optimizer=dict(lr=2e-4))
