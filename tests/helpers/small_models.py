"""Constructor arguments that make a model of each architecture small, for tests that train or compile."""

SMALL = {
    "mamba_vision_T": {
        "dim": 16,
        "in_dim": 8,
        "depths": (1, 1, 2, 2),
        "num_heads": (1, 1, 2, 4),
        "window_size": (8, 8, 4, 2),
        "num_classes": 10,
    },
    "vmamba_tiny_s1l8": {"dims": 16, "depths": (1, 1, 2, 1), "num_classes": 10},
    "segman_encoder_t": {
        "embed_dims": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "projection": 24,
        "layer_scale": 1e-2,
        "num_classes": 10,
    },
    "vanilla_vmamba_tiny": {"dims": 16, "depths": (1, 1, 2, 1), "ssm_d_state": 4, "num_classes": 10},
}
