# The demo with a small SegMAN. Its finest map has stride 8, which is wider than the strokes of the digits: pictures are
# enlarged to 192x192 pixels. With half the width in the first stage, it took hundreds of iterations more to learn them.
_base_ = "../mamba_vision/upernet_mamba_vision_digits.py"
iterations = 1100

dims = (32, 64, 96, 128)
model = dict(
    data_preprocessor=dict(size=(192, 192)),
    backbone=dict(
        _delete_=True,
        type="SegMANEncoder_t",
        embed_dims=dims,
        depths=(1, 2, 2, 1),
        num_heads=(1, 2, 4, 4),
        window_size=(7, 7, 7, 7),
        mlp_ratios=(3, 3, 3, 3),
    ),
    decode_head=dict(
        _delete_=True,
        type="SegMANDecoder",
        **{**_base_.heads, "channels": 48},
        in_channels=dims,
        feat_proj_dim=64,
        loss_decode=dict(type="CrossEntropyLoss", **_base_.loss),
    ),
    auxiliary_head=dict(in_channels=dims[1]),
)

resize = dict(type="Resize", scale=(192, 192), keep_ratio=True)
train_dataloader = dict(dataset=dict(pipeline=[_base_.load, _base_.load_masks, resize, _base_.pack]))
val_dataloader = dict(dataset=dict(pipeline=[_base_.load, resize, _base_.load_masks, _base_.pack]))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=iterations)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=500, T_max=iterations - 500, eta_min=1e-5),
]
