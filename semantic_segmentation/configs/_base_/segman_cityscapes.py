_base_ = ["./segman.py", "./cityscapes_1024x1024.py"]

model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(768, 768)),
)
train_dataloader = dict(batch_size=2)  # for 4 GPUs
auto_scale_lr = dict(base_batch_size=8)
