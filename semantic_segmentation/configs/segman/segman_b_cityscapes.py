_base_ = "../_base_/segman_cityscapes.py"

model = dict(
    backbone=dict(type="SegMANEncoder_b", drop_path_rate=0.25),
    decode_head=dict(**_base_.segman.b),
)
