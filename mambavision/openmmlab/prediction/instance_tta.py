"""Test-time augmentation for models with masks, which MMDetection's own does not support."""

import torch
from mmcv.ops import batched_nms
from mmdet.models import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """Merge the detections of the views of an image; each kept box keeps the mask of its own view."""

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        merged, *_ = data_samples
        views = [sample.pred_instances for sample in data_samples]
        boxes, scores = self.merge_aug_bboxes(
            [view.bboxes for view in views],
            [view.scores for view in views],
            [sample.metainfo for sample in data_samples],
        )
        if not len(boxes):
            return merged
        labels = torch.cat([view.labels for view in views])
        scored_boxes, kept = batched_nms(boxes, scores, labels, self.tta_cfg.nms)
        limit = self.tta_cfg.max_per_img
        scored_boxes, kept = scored_boxes[:limit], kept[:limit]
        results = InstanceData(bboxes=scored_boxes[:, :4], scores=scored_boxes[:, 4], labels=labels[kept])
        if "masks" in views[0]:
            masks = torch.cat([_flipped_back(sample) for sample in data_samples])
            results.masks = masks[kept.to(masks.device)]
        merged.pred_instances = results
        return merged


def _flipped_back(sample: DetDataSample) -> Tensor:
    """(instances, H, W) masks as on the original image."""
    masks = sample.pred_instances.masks
    if not sample.flip:
        return masks
    axes = {"horizontal": [-1], "vertical": [-2], "diagonal": [-2, -1]}[sample.flip_direction]
    return masks.flip(axes)
