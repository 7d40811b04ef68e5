_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/vssm.py",
    "../_base_/coco_instance_multi_scale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.vssm.small), neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(type="OptimWrapper")  # in float32; tools/train.py has --amp
