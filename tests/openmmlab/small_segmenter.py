# A small UPerNet for four iterations with checkpoints after two and four.
_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../../semantic_segmentation/configs/_base_/ade20k.py",
    "../../semantic_segmentation/configs/_base_/schedule_160k.py",
    "../../semantic_segmentation/configs/_base_/runtime.py",
]
head = dict(channels=8, num_classes=11)
backbones = dict(
    mamba_vision=dict(
        type="MM_mamba_vision",
        dim=16,
        in_dim=8,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 4),
        window_size=(8, 8, 4, 2),
    ),
    vssm=dict(type="MM_VSSM", dims=16, depths=(1, 1, 2, 1), ssm_d_state=1, forward_type="v05_noz"),
)
model = dict(
    data_preprocessor=dict(size=(48, 48)),
    backbone=dict(_delete_=True, **backbones["{{$BACKBONE:mamba_vision}}"]),
    decode_head=dict(in_channels=[16, 32, 64, 128], **head),
    auxiliary_head=dict(in_channels=64, **head),
)
data = dict(
    type="BaseSegDataset",
    metainfo=dict(classes=("none", *"0123456789")),
    reduce_zero_label=True,
)
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **data,
        pipeline=[
            *load,
            dict(type="RandomResize", scale=(64, 64), ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(48, 48), cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ],
    ),
)
resize = dict(type="Resize", scale=(64, 64), keep_ratio=True)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, pipeline=[load[0], resize, load[1], dict(type="PackSegInputs")]),
)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=3)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=6)]
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
randomness = dict(seed=3)
