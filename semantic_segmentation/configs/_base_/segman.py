# What all SegMAN models have in common, and their widths.
_base_ = ["mmseg::_base_/schedules/schedule_160k.py", "./runtime.py"]

segman = dict(
    t=dict(in_channels=[32, 64, 144, 192], channels=128, feat_proj_dim=192),
    s=dict(in_channels=[64, 144, 288, 512], channels=144, feat_proj_dim=288),
    b=dict(in_channels=[96, 160, 364, 560], channels=180, feat_proj_dim=320),
    l=dict(in_channels=[96, 192, 432, 640], channels=224, feat_proj_dim=432),
    l2=dict(in_channels=[96, 192, 448, 640], channels=224, feat_proj_dim=448),
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    # The released SegMAN_Encoder_x.pth.tar have no address: --cfg-options model.backbone.pretrained=FILE
    backbone=dict(pretrained=None),
    decode_head=dict(
        type="SegMANDecoder",
        in_index=[0, 1, 2, 3],
        dropout_ratio=0.1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
sync_bn = "torch"  # synchronise those of the backbone, too

train_cfg = dict(val_interval=4000)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # By name, and "head" goes before "norm": norms of decode_head keep their decay, as do batch norms by other names.
    paramwise_cfg=dict(
        custom_keys={
            "head": dict(lr_mult=10.0),
            "norm": dict(decay_mult=0.0),
            "pos_block": dict(decay_mult=0.0),
        }
    ),
)
# The original's rate, iteration by iteration: it decays during warm-up, too. mmengine ends one iteration early.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=0, end=160001),
]
default_hooks = dict(checkpoint=dict(type="SafeCheckpointHook", interval=4000))
auto_scale_lr = dict(enable=False, base_batch_size=16)
