# Your own data in COCO's format: name its files here, and its classes in the order of the annotations' categories.
_base_ = "./mask_rcnn_mamba_vision_tiny_1x_coco.py"

classes = ("cat", "dog")
data_root = "{{$DATA_ROOT:data/own}}"

model = dict(roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))))

data = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    dataset=dict(data, ann_file="annotations/train.json", data_prefix=dict(img="train/")),
)
val_dataloader = dict(
    dataset=dict(data, ann_file="annotations/val.json", data_prefix=dict(img="val/")),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/val.json")
test_evaluator = val_evaluator
del data
