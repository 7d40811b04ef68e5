"""torchvision's operators in place of mmcv's compiled ones, as far as the configs of this project need them.

mmcv-lite has all of ``mmcv.ops`` except the compiled module ``mmcv._ext``. `install` provides a module of that name
whose functions have the signatures of the compiled ones and give the same numbers, on the CPU and on CUDA.
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
    """Install the replacement, unless mmcv has its compiled operators."""
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return
    module = types.ModuleType(_NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(_NAME, None)  # mmengine looks for it
    vars(module).update(
        nms=nms,
        roi_align_forward=roi_align_forward,
        roi_align_backward=roi_align_backward,
        get_compiler_version=lambda: "none: torchvision's operators are used instead",
        get_compiling_cuda_version=lambda: str(torch.version.cuda),
        __getattr__=_not_available,
    )
    sys.modules[_NAME] = module


def _not_available(name: str) -> Callable:
    """Return a function that raises: mmcv looks up every operator on import, so only calling one may fail."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv's operator {name} is not available: mmcv-lite has no compiled operators, and torchvision replaces "
            "nms and roi_align only; use a model that does not need it, or install a compiled mmcv 2.1.0."
        )

    return refuse


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the kept boxes, by descending score.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,)
        iou_threshold: A box is dropped if it overlaps a better one by more than this.
        offset: 1 if x2 and y2 are the last pixels inside the box, 0 if they are its edge.
    """
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)


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
        sampling_ratio: Samples per cell in each direction; 0 for one per pixel.
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
    """Return a type that torchvision supports: neither 16 bits on the CPU nor bfloat16 on CUDA."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
