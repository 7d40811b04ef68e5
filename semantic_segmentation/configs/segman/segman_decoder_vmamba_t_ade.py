# SegMAN's decoder on another backbone, as in segman_decoder_mamba_vision_t_ade.py.
_base_ = "../_base_/segman_ade20k.py"

model = dict(
    backbone=dict(type="RegisteredBackbone", name="vmamba_tiny_s1l8", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768], channels=128, feat_proj_dim=192),
)
find_unused_parameters = True  # the norm of the first map, which the decoder does not use
