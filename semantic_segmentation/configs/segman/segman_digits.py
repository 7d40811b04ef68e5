# The demo with a small SegMAN. Its finest map has stride 8, which is wider than the strokes of the digits: pictures are
# enlarged to 256x256 pixels. Iterations and batches are those of MambaVision's demo; from scratch it reached mIoUs of
# 75.1 and 75.6, in sixteen minutes on two cores.
_base_ = "../mamba_vision/upernet_mamba_vision_digits.py"

dims = (16, 48, 96, 128)
# MMSegmentation's heads start with weights near zero in front of the classes: from PyTorch's (init_cfg=None), the model
# learned the digits hundreds of iterations earlier.
model = dict(
    data_preprocessor=dict(size=(256, 256)),
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
        init_cfg=None,
        in_channels=dims,
        feat_proj_dim=64,
        loss_decode=dict(type="CrossEntropyLoss", **_base_.loss),
    ),
    auxiliary_head=dict(in_channels=dims[1], init_cfg=None),
)

resize = dict(type="Resize", scale=(256, 256), keep_ratio=True)
train_dataloader = dict(dataset=dict(pipeline=[_base_.load, _base_.load_masks, resize, _base_.pack]))
val_dataloader = dict(dataset=dict(pipeline=[_base_.load, resize, _base_.load_masks, _base_.pack]))
test_dataloader = val_dataloader
