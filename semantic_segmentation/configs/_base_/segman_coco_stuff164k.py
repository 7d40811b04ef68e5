_base_ = ["./segman.py", "./coco_stuff164k.py"]

model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=171))
train_dataloader = dict(batch_size=4)  # for 4 GPUs

test_pipeline = [  # as in segman_ade20k.py
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
