# The published backbones.
common = dict(
    type="MM_mamba_vision",
    num_heads=(2, 4, 8, 16),
    # One window around everything in the last two stages of a 512x512 image, where the maps have 32x32 and 16x16
    # pixels: the rest of it is padding, which the released weights have learned to live with.
    window_size=(8, 8, 64, 32),
    # What the published models were trained with, whatever their configs say (0.3, 0.7, 0.4 and 0.8): the original
    # backbone never takes it over.
    drop_path_rate=0.2,
)
tiny = dict(common, dim=80, in_dim=32, depths=(1, 3, 8, 4), pretrained="mamba_vision_T")
mamba_vision = dict(
    tiny=tiny,
    # For new training: windows that the maps of a 512x512 image just fill. See
    # mamba_vision_160k_ade20k-512x512_tiny_tight_windows.py for what they save.
    tiny_tight_windows=dict(tiny, window_size=(8, 8, 32, 16)),
    small=dict(
        common, dim=96, in_dim=64, depths=(3, 3, 7, 5), window_size=(8, 8, 160, 56), pretrained="mamba_vision_S"
    ),
    base=dict(common, dim=128, in_dim=64, depths=(3, 3, 10, 5), layer_scale=1e-5, pretrained="mamba_vision_B"),
    l3=dict(
        common,
        dim=256,
        in_dim=64,
        depths=(3, 3, 20, 10),
        num_heads=(4, 8, 16, 32),
        layer_scale=1e-5,
        pretrained="mamba_vision_L3_512_21k",
    ),
)
del common, tiny
