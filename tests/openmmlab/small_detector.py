# A small Mask R-CNN for two epochs of two steps.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "../../object_detection/configs/_base_/runtime.py",
]
data_root = "{{$SCENES_ROOT:}}"
head = dict(in_channels=16, num_classes=10)
norm = dict(type="SyncBN")
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
    backbone=dict(_delete_=True, **backbones["{{$BACKBONE:mamba_vision}}"]),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16, norm_cfg=norm),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(**head, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(**head, num_convs=1, conv_out_channels=16),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(max_per_img=4)),
)
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
scale = dict(type="Resize", scale=(64, 64), keep_ratio=True)
metas = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
data = dict(
    data_root=data_root,
    metainfo=dict(classes=tuple("0123456789")),
)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **data,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        pipeline=[*load, scale, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **data,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        pipeline=[load[0], scale, load[1], dict(type="PackDetInputs", meta_keys=metas)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_val.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=6)]
optim_wrapper = dict(_delete_=True, type="AmpOptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=3)
