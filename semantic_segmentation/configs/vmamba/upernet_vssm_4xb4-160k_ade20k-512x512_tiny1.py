_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/vssm.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k_float32.py",
    "../_base_/runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, **_base_.vssm.tiny1),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)

train_dataloader = dict(batch_size=2)  # for 8 GPUs, whatever the name of the file says
