# The same without mixed precision, which tools/train.py --amp brings back, and with fewer validations.
_base_ = "./schedule_160k.py"

train_cfg = dict(val_interval=16000)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=6e-5))
default_hooks = dict(checkpoint=dict(interval=16000))
