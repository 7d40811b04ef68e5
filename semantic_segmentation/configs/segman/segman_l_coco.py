_base_ = "../_base_/segman_coco_stuff164k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_l", drop_path_rate=0.3),  # not published for this size
    decode_head=dict(**_base_.segman.l),
)
