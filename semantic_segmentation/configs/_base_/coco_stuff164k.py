_base_ = "mmseg::_base_/datasets/coco-stuff164k.py"

data_root = "{{$COCO_STUFF_ROOT:data/coco_stuff164k}}"

train_dataloader = dict(
    dataset=dict(data_root=data_root),
)
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
