# Not among the published models.
_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/mamba_vision.py",
    "../_base_/coco_stuff164k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, **_base_.mamba_vision.tiny_tight_windows),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=171),
    auxiliary_head=dict(in_channels=320, num_classes=171),
)

train_dataloader = dict(batch_size=2)  # for 8 GPUs
