_base_ = "../_base_/segman_cityscapes.py"

model = dict(
    backbone=dict(type="SegMANEncoder_s", drop_path_rate=0.2),
    # Wider than with other data, as the released weights are.
    decode_head={**_base_.segman.s, "channels": 152},
)
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
