_base_ = "../_base_/segman_ade20k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_t", drop_path_rate=0.0),
    decode_head=dict(**_base_.segman.t),
)
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
