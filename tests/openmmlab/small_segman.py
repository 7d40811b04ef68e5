# A small SegMAN for the data and schedule of the small UPerNet.
_base_ = "./small_segmenter.py"
dims = [8, 16, 24, 32]
model = dict(
    backbone=dict(
        _delete_=True,
        type="SegMANEncoder_t",
        embed_dims=dims,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_size=(5, 3, 3, 3),
        drop_path_rate=0.2,
    ),
    decode_head=dict(
        _delete_=True,
        type="SegMANDecoder",
        **_base_.head,
        in_channels=dims,
        feat_proj_dim=12,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    auxiliary_head=None,
)
sync_bn = "torch"
