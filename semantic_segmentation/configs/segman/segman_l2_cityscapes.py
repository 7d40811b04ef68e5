_base_ = "../_base_/segman_cityscapes.py"

model = dict(
    backbone=dict(type="SegMANEncoder_l2", drop_path_rate=0.3),  # not published for this size
    decode_head=dict(**_base_.segman.l2),
    test_cfg=dict(_delete_=True, mode="whole"),
)
train_cfg = dict(val_interval=8000)
