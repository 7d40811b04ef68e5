# The published backbones.
common = dict(
    type="MM_mamba_vision",
    num_heads=(2, 4, 8, 16),
    # One window around everything in the last two stages, for images up to 1792 pixels: the rest of it is padding.
    window_size=(8, 8, 112, 56),
    # What the published detectors were trained with, whatever their configs say.
    drop_path_rate=0.2,
)
mamba_vision = dict(
    tiny=dict(common, dim=80, in_dim=32, depths=(1, 3, 8, 4), pretrained="mamba_vision_T"),
    small=dict(common, dim=96, in_dim=64, depths=(3, 3, 7, 5), pretrained="mamba_vision_S"),
    base=dict(common, dim=128, in_dim=64, depths=(3, 3, 10, 5), layer_scale=1e-5, pretrained="mamba_vision_B"),
)
del common
