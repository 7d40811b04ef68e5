"""torchvision in the place of mmcv's compiled operators, against cases computed by hand."""

import mambavision.openmmlab  # noqa: F401 - before mmcv.ops

# isort: split
import sys

import mmcv.ops
import numpy as np
import pytest
import torch

from mambavision.openmmlab import mmcv_ops

pytestmark = pytest.mark.skipif(
    sys.modules["mmcv._ext"].__doc__ != mmcv_ops.__doc__, reason="mmcv's own operators are installed"
)

# IoU of the first two is 1/2, of the first and third 1/5.
BOXES = torch.tensor([[0.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 4.0], [0.0, 2.0, 2.0, 5.0], [9.0, 9.0, 10.0, 10.0]])
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6])


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.1, [0, 3]), (0.4, [0, 2, 3]), (0.5, [0, 1, 2, 3])], ids=["low", "middle", "equal"]
)
def test_nms(threshold, kept):
    boxes, indices = mmcv.ops.nms(BOXES, SCORES, threshold)
    assert indices.tolist() == kept
    torch.testing.assert_close(boxes, torch.cat([BOXES, SCORES[:, None]], 1)[kept])


def test_nms_counts_the_last_pixel_with_offset():
    # With the last pixels inside, the first two share 3 x 3 of 3 x 4 + 3 x 4 - 3 x 3 = 15 pixels: 0.6.
    assert mmcv.ops.nms(BOXES, SCORES, 0.55, offset=1)[1].tolist() == [0, 2, 3]
    assert mmcv.ops.nms(BOXES, SCORES, 0.65, offset=1)[1].tolist() == [0, 1, 2, 3]


def test_nms_filters_and_limits():
    assert mmcv.ops.nms(BOXES, SCORES, 0.6, score_threshold=0.65, max_num=2)[1].tolist() == [0, 1]
    assert mmcv.ops.nms(BOXES[:0], SCORES[:0], 0.5)[1].tolist() == []
    assert mmcv.ops.nms(BOXES.numpy(), SCORES.numpy(), 0.4)[1].tolist() == [0, 2, 3]
    _, kept = mmcv.ops.batched_nms(BOXES, SCORES, torch.tensor([0, 1, 0, 0]), {"type": "nms", "iou_threshold": 0.4})
    assert kept.tolist() == [0, 1, 2, 3]


def _by_hand(features, roi, size, scale, samples, aligned):
    """RoIAlign as its paper says: the mean of bilinear samples in each cell."""
    _, height, width = features.shape
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (float(value) * scale - shift for value in roi)
    box_width, box_height = x2 - x1, y2 - y1
    if not aligned:
        box_width, box_height = max(box_width, 1.0), max(box_height, 1.0)
    result = np.zeros((features.shape[0], size, size))
    for row in range(size):
        for column in range(size):
            for i in range(samples):
                for j in range(samples):
                    y = y1 + box_height / size * (row + (i + 0.5) / samples)
                    x = x1 + box_width / size * (column + (j + 0.5) / samples)
                    if -1 <= y <= height and -1 <= x <= width:
                        result[:, row, column] += _bilinear(features, max(y, 0.0), max(x, 0.0)) / samples**2
    return result


def _bilinear(features, y, x):
    _, height, width = features.shape
    y, x = min(y, height - 1), min(x, width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = features[:, top, left] * (1 - dx) + features[:, top, right] * dx
    lower = features[:, bottom, left] * (1 - dx) + features[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_roi_align(aligned, dtype):
    features = torch.randn(2, 3, 6, 7, dtype=torch.float64).to(dtype)
    rois = torch.tensor([[0, 1.0, 2.0, 9.0, 10.0], [1, 3.0, 0.0, 4.0, 11.0], [0, -3.0, -3.0, 20.0, 5.0]], dtype=dtype)
    ours = mmcv.ops.RoIAlign(2, 0.5, 2, aligned=aligned)(features, rois)
    expected = [_by_hand(features[int(r[0])].double().numpy(), r[1:], 2, 0.5, 2, aligned) for r in rois]
    assert ours.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    np.testing.assert_allclose(ours.double(), np.stack(expected), atol=tolerance)


def test_roi_align_of_one_pixel():
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    rois = torch.tensor([[0, 1.0, 2.0, 2.0, 3.0]])  # covers the pixel in row 2, column 1
    assert mmcv.ops.roi_align(features, rois, (1, 1), 1.0, 1, "avg", True).item() == 9.0


def test_gradient_of_roi_align():
    features = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.0, 1.0, 4.0, 4.0], [1, 1.0, 1.0, 3.0, 5.0], [1, 2.0, 0.0, 5.0, 3.0]]).double()
    assert torch.autograd.gradcheck(lambda x: mmcv.ops.roi_align(x, rois, (2, 2), 1.0, 2, "avg", True), features)
    assert mmcv.ops.roi_align(features, rois[:0], (2, 2), 1.0, 2, "avg", True).shape == (0, 2, 2, 2)


def test_operators_that_are_missing_say_so():
    with pytest.raises(NotImplementedError, match=r"operator nms_rotated is not available.*install a compiled mmcv"):
        mmcv.ops.nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'.*use 'avg'"):
        mmcv.ops.roi_align(torch.rand(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 2, "max", True)


def test_environment_is_described():
    from mmengine.utils.dl_utils import collect_env

    assert collect_env()
    assert "torchvision" in mmcv.ops.get_compiler_version()


def test_compiled_operators_are_preferred(monkeypatch):
    modules = {}
    monkeypatch.setattr(mmcv_ops.sys, "modules", modules)
    monkeypatch.setattr(mmcv_ops.importlib.util, "find_spec", lambda name: object())
    mmcv_ops.install()
    assert not modules
