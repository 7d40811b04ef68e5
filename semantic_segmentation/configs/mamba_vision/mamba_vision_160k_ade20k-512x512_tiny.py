_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/mamba_vision.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, **_base_.mamba_vision.tiny),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150),
)

train_dataloader = dict(batch_size=1)  # for 16 GPUs
