_base_ = "../_base_/segman_ade20k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_b", drop_path_rate=0.25),
    decode_head=dict(**_base_.segman.b),
)
train_cfg = dict(val_interval=8000)
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
