_base_ = "../_base_/segman_ade20k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_l", drop_path_rate=0.3),  # not published for this size
    decode_head=dict(**_base_.segman.l),
)
train_cfg = dict(val_interval=8000)
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
