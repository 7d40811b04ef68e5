"""The operators of mmcv that detectors and segmentors need, answered by torchvision where mmcv's own are not compiled.

mmcv-lite has all of ``mmcv.ops`` except the compiled module ``mmcv._ext`` behind it. `install` puts a module of that
name in place whose functions have the compiled ones' signatures and numbers, on the CPU and on CUDA.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

_NAME = "mmcv._ext"


def install() -> None:
    """Install the stand-in, unless mmcv has its compiled operators."""
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return
    module = types.ModuleType(_NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(_NAME, None)  # mmengine looks for it
    for function in (nms, softnms, roi_align_forward, roi_align_backward):
        setattr(module, function.__name__, function)
    module.get_compiler_version = lambda: "none: torchvision's operators stand in"
    module.get_compiling_cuda_version = lambda: str(torch.version.cuda)
    module.__getattr__ = _not_available
    sys.modules[_NAME] = module


def _not_available(name: str) -> Callable:
    """mmcv asks for every operator when it is imported, so that only calling a missing one can be an error."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv's operator {name} is not available: mmcv-lite has no compiled operators, and torchvision stands in "
            "for nms, soft_nms and roi_align only; use a model that does without it, or install a compiled mmcv 2.1.0."
        )

    return refuse


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the boxes that are kept, by falling score.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,)
        iou_threshold: A box is dropped if it overlaps a better one by more than this.
        offset: 1 if x2 and y2 are the last pixels inside the box, 0 if they are its border.
    """
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression (Bodla et al. 2017, https://arxiv.org/abs/1704.04503).

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,)
        dets: (N, 5), receives boxes and new scores, in order of their choice.
        iou_threshold: Overlap above which scores shrink (not used by the Gaussian).
        sigma: Width of the Gaussian.
        min_score: Boxes below it are dropped.
        method: 0 drops overlapping boxes, 1 multiplies their score by 1 - IoU, 2 by exp(-IoU^2 / sigma).
        offset: As for `nms`.

    Returns:
        The indices of the boxes that are kept, in order of their choice.
    """
    corners = boxes + boxes.new_tensor([0, 0, offset, offset])
    scores = scores.clone()
    left = torch.ones_like(scores, dtype=torch.bool)
    kept: list[int] = []
    while left.any():
        best = int(torch.where(left, scores, -torch.inf).argmax())
        left[best] = False
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        iou = torchvision.ops.box_iou(corners[best : best + 1], corners)[0]
        if method == 2:
            weight = torch.exp(-iou.square() / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1)
        scores = torch.where(left, scores * weight, scores)
        left &= scores >= min_score
    return torch.tensor(kept, dtype=torch.int64)


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the average of each cell of each region of interest to `output`.

    Args:
        features: (batch, channels, H, W)
        rois: (N, 5) as index in the batch, x1, y1, x2, y2.
        output: (N, channels, aligned_height, aligned_width)
        argmax_y, argmax_x: Not used by averages.
        aligned_height, aligned_width: Cells.
        spatial_scale: Pixels of the features over those of the boxes.
        sampling_ratio: Samples of a cell in each direction; 0 for as many as there are pixels.
        pool_mode: 1, the average.
        aligned: Shift by half a pixel, so that a box covers the pixels whose centres are inside.
    """
    if pool_mode != 1:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled operators, which are not installed; use 'avg'."
        )
    size = (aligned_height, aligned_width)
    dtype = _computable(features)
    output.copy_(
        torchvision.ops.roi_align(
            features.to(dtype), rois.to(dtype), size, spatial_scale, max(sampling_ratio, 0), aligned=aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward` with respect to the features to `grad_input`; arguments as there."""
    dtype = _computable(grad_output)
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        max(sampling_ratio, 0),
        aligned,
    ).to(grad_input.dtype)


def _computable(x: Tensor) -> torch.dtype:
    """torchvision's CPU kernels do not take 16 bits, nor its CUDA kernels bfloat16."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
