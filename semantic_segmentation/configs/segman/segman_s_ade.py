_base_ = "../_base_/segman_ade20k.py"

model = dict(
    backbone=dict(type="SegMANEncoder_s", drop_path_rate=0.15),
    decode_head=dict(**_base_.segman.s),
)
train_cfg = dict(val_interval=8000)
