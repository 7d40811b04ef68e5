# The published backbones.
common = dict(
    type="MM_VSSM",
    mlp_ratio=4.0,
    ssm_d_state=1,
    ssm_dt_rank="auto",
    ssm_conv=3,
    ssm_conv_bias=False,
    forward_type="v05_noz",
    patchembed_version="v2",
    downsample_version="v3",
    norm_layer="ln2d",
)
wide = dict(common, ssm_ratio=2.0)  # twice as many channels are scanned as there are
vssm = dict(
    tiny=dict(common, dims=96, depths=(2, 2, 8, 2), ssm_ratio=1.0, drop_path_rate=0.2, pretrained="vmamba_tiny_s1l8"),
    tiny1=dict(wide, dims=96, depths=(2, 2, 5, 2), drop_path_rate=0.2, pretrained="vmamba_tiny_s2l5"),
    small=dict(wide, dims=96, depths=(2, 2, 15, 2), drop_path_rate=0.3, pretrained="vmamba_small_s2l15"),
    base=dict(wide, dims=128, depths=(2, 2, 15, 2), drop_path_rate=0.6, pretrained="vmamba_base_s2l15"),
)
del common, wide
