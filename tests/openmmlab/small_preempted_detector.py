# The small detector with all that a preempted run has to keep.
_base_ = "./small_detector.py"
train_dataloader = dict(batch_size=1, num_workers=2)
train_cfg = dict(max_epochs=2)
optim_wrapper = dict(accumulative_counts=2, clip_grad=dict(max_norm=1.0))
model = dict(backbone=dict(drop_path_rate=0.2))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best="coco/bbox_mAP"))
custom_hooks = [dict(type="EMAHook", momentum=0.1), dict(type="Disturb")]
