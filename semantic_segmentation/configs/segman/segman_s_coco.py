_base_ = "../_base_/segman_coco_stuff164k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_s", drop_path_rate=0.2),
    decode_head=dict(**_base_.segman.s),
)
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
