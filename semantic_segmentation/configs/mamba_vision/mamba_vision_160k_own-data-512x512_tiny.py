# Your own data: put its classes here, in the order of their numbers in the masks, their colours, and its folders.
# Masks are PNG files with the number of each pixel's class, from 0 on; 255 is for none.
_base_ = "./mamba_vision_160k_coco-stuff164k-512x512_tiny.py"

classes = ("background", "cat", "dog")
palette = [[120, 120, 120], [255, 140, 0], [0, 110, 255]]  # red, green, blue
data_root = "{{$DATA_ROOT:data/own}}"

model = dict(decode_head=dict(num_classes=len(classes)), auxiliary_head=dict(num_classes=len(classes)))

data = dict(type="BaseSegDataset", data_root=data_root, metainfo=dict(classes=classes, palette=palette))
train_dataloader = dict(
    batch_size=16,  # on one GPU
    dataset=dict(data, data_prefix=dict(img_path="images/training", seg_map_path="annotations/training")),
)
val_dataloader = dict(
    dataset=dict(data, data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation")),
)
test_dataloader = val_dataloader
del data
