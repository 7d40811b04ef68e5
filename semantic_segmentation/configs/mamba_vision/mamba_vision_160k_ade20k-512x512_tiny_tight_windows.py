_base_ = "./mamba_vision_160k_ade20k-512x512_tiny.py"

model = dict(backbone=dict(window_size=(8, 8, 32, 16)))
