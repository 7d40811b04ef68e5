_base_ = ["./segman.py", "./ade20k.py"]

model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))
train_dataloader = dict(batch_size=4)  # for 4 GPUs

# Both sides are scaled to the next multiple of 32, before the masks are loaded, which keep their size.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
