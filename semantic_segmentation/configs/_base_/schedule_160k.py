# AdamW in mixed precision, 160000 iterations with batches of 16.
_base_ = "mmseg::_base_/schedules/schedule_160k.py"

train_cfg = dict(val_interval=10000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # By name, as in the original: norm1, norm2 and outnorm, but not batch norms called bn, biases, A_log and D.
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
default_hooks = dict(checkpoint=dict(type="SafeCheckpointHook", interval=10000))
auto_scale_lr = dict(enable=False, base_batch_size=16)
