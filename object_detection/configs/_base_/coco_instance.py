# COCO 2017 with the multi-scale training of DETR and Sparse R-CNN: half of the images are cropped in between.
_base_ = "mmdet::_base_/datasets/coco_instance.py"

data_root = "{{$COCO_ROOT:data/coco}}"

short_sides = dict(type="RandomChoiceResize", scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [short_sides],
            [
                dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                short_sides,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    # Workers that start anew with each epoch make a resumed run continue exactly; it costs seconds an epoch.
    persistent_workers=False,
    worker_init_fn=dict(type="seed_workers_by_epoch"),
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_val2017.json")
test_evaluator = val_evaluator
