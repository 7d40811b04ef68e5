# The demo with a small VMamba.
_base_ = "../mamba_vision/upernet_mamba_vision_digits.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_VSSM",
        dims=32,
        depths=(1, 2, 2, 2),
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        patchembed_version="v2",
        downsample_version="v3",
        drop_path_rate=0.0,
    ),
)
