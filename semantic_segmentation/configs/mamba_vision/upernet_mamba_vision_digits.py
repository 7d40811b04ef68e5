# A small UPerNet for handwritten digits on photographs of 128x128 pixels: the demo.
_base_ = ["mmseg::_base_/models/upernet_swin.py", "../_base_/runtime.py"]

data_root = "{{$SCENES_ROOT:../output/demo-segmentation/scenes}}"
iterations, batch_size = 1500, 8

# Model: the heads are as narrow as the backbone. What made it learn to tell the digits apart, where otherwise it found
# strokes and called them background:
# - many digits of much the same size on each picture, see demo.py;
# - little weight on the background, which is 88 % of the pixels. With twice as much it takes longer to learn the
#   digits; with this, strokes come out a little too fat;
# - an auxiliary head on the second stage, whose maps of stride 8 show all of a digit, and still each one alone.
# The Dice loss of MMSegmentation did not help: it adds up all classes, and so the background outweighs the digits.
width = 64
heads = dict(channels=width, num_classes=11, dropout_ratio=0.0, norm_cfg=dict(type="BN"))
loss = dict(class_weight=[0.2] + [1.0] * 10, avg_non_ignore=True)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        _delete_=True,
        type="MM_mamba_vision",
        dim=32,
        in_dim=16,
        depths=(1, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=(8, 8, 8, 4),
        drop_path_rate=0.0,
    ),
    decode_head=dict(**heads, in_channels=[32, 64, 128, 256], loss_decode=loss),
    auxiliary_head=dict(**heads, in_channels=64, in_index=1, loss_decode=loss),
)

# Data
metainfo = dict(
    classes=("background", *"0123456789"),
    palette=[
        *([0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180]),
        *([70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 212]),
    ],
)
data = dict(type="BaseSegDataset", data_root=data_root, metainfo=metainfo, reduce_zero_label=True)
load, load_masks, pack = (dict(type=step) for step in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs"))
resize = dict(type="Resize", scale=(128, 128), keep_ratio=True)  # for pictures of other sizes
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **data,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[load, load_masks, pack],
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **data,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[load, resize, load_masks, pack],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# Schedule
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=300)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=50),
    # The rate stays high until the model begins to tell the digits apart.
    dict(type="CosineAnnealingLR", by_epoch=False, begin=700, T_max=iterations - 700, eta_min=1e-5),
]
default_hooks = dict(
    checkpoint=dict(type="SafeCheckpointHook", by_epoch=False, interval=300, max_keep_ckpts=1),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    visualization=dict(type="SegVisualizationHook"),
)
randomness = dict(seed=31)
