# A small Mask R-CNN for handwritten digits on photographs of 160x160 pixels: the demo.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/runtime.py",
]

data_root = "{{$SCENES_ROOT:../output/demo-detection/scenes}}"
epochs, batch_size = 4, 4

# Model: the heads are as narrow as the backbone.
width = 48
norm = dict(type="GN", num_groups=8)
one_sample = dict(sampling_ratio=1)
proposals = dict(nms_pre=200, max_per_img=100)
model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_mamba_vision",
        dim=32,
        in_dim=16,
        depths=(1, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=(8, 8, 10, 5),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, norm_cfg=norm, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(ratios=[1.0, 2.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=28, roi_layer=one_sample),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=10, reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=width, finest_scale=28, roi_layer=one_sample),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, num_classes=10, class_agnostic=True),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=proposals,
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=proposals, rcnn=dict(max_per_img=20)),
)

# Data
classes = tuple("0123456789")
loading = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
]
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
common = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        **common,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(_delete_=True),
        pipeline=[*loading, dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        **common,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        pipeline=[*loading, dict(type="PackDetInputs", meta_keys=meta_keys)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_val.json")
test_evaluator = val_evaluator

# Schedule
randomness = dict(seed=31)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_begin=epochs + 1)  # tools/test.py scores
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=8e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=150),
    dict(type="CosineAnnealingLR", by_epoch=True, T_max=epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1), logger=dict(interval=100))
