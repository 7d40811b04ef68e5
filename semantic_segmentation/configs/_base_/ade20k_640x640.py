_base_ = "mmseg::_base_/datasets/ade20k_640x640.py"

data_root = "{{$ADE20K_ROOT:data/ade/ADEChallengeData2016}}"

train_dataloader = dict(
    dataset=dict(data_root=data_root),
)
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
