# Not among the published models.
_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/mamba_vision.py",
    "../_base_/cityscapes.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(_delete_=True, **_base_.mamba_vision.tiny),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=19),
    auxiliary_head=dict(in_channels=320, num_classes=19),
    # The windows as in training: whole images of 1024x2048 pixels would be cut into others.
    test_cfg=dict(mode="slide", crop_size=(512, 1024), stride=(341, 683)),
)

train_dataloader = dict(batch_size=2)  # for 8 GPUs
