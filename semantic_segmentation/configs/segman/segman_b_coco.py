_base_ = "../_base_/segman_coco_stuff164k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_b", drop_path_rate=0.2),
    decode_head=dict(**_base_.segman.b),
)
