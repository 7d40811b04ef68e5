_base_ = [
    "../_base_/cascade_mask_rcnn.py",
    "../_base_/mamba_vision.py",
    "../_base_/coco_instance_multi_scale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.mamba_vision.small), neck=dict(in_channels=[96, 192, 384, 768]))
