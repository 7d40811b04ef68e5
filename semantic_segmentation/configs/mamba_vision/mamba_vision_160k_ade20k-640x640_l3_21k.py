_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/mamba_vision.py",
    "../_base_/ade20k_640x640.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(_delete_=True, **_base_.mamba_vision.l3),
    decode_head=dict(in_channels=[256, 512, 1024, 2048], num_classes=150),
    auxiliary_head=dict(in_channels=1024, num_classes=150),
)

train_cfg = dict(val_interval=5000)
train_dataloader = dict(batch_size=1)  # for 16 GPUs
optim_wrapper = dict(
    type="OptimWrapper",  # mixed precision is unstable with this model
    optimizer=dict(lr=8e-5, weight_decay=0.05),
)
