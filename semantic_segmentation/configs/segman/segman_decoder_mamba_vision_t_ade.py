# SegMAN's decoder on another backbone; any model of this package or of timm goes by its name.
_base_ = "../_base_/segman_ade20k.py"

model = dict(
    backbone=dict(type="RegisteredBackbone", name="mamba_vision_T", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[80, 160, 320, 640], channels=128, feat_proj_dim=192),
)
find_unused_parameters = True  # the norm of the first map, which the decoder does not use
