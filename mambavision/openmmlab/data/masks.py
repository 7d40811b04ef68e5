"""Reading and checking of masks, which contain the class index of each pixel."""

from typing import Any

import numpy as np
from mmengine import Config
from mmengine.config import ConfigDict
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

from mambavision.errors import DataError
from mambavision.openmmlab.config import settings_in


def number_of_classes(config: Config) -> tuple[int, int]:
    """Return the number of classes of a config's model, and the label of pixels without a class."""
    heads = config.model.decode_head
    head = heads[-1] if isinstance(heads, list) else heads
    return head.num_classes, head.get("ignore_index", 255)


def problem_of(
    labels: np.ndarray, image_shape: tuple[int, int] | None, num_classes: int, ignored: int, is_reduced: bool
) -> str:
    """Return the problem of an invalid mask, or an empty string.

    Args:
        labels: (H, W) class indices as used in training.
        image_shape: Height and width of the image in pixels, if known.
        num_classes: Number of classes.
        ignored: Label of pixels without a class.
        is_reduced: The indices are one less than in the file, where 0 marks pixels without a class.
    """
    if labels.ndim != 2:
        return f"has {labels.shape[-1]} channels, but a mask has one, the class index of each pixel"
    if image_shape is not None and labels.shape != tuple(image_shape[:2]):
        (height, width), (image_height, image_width) = labels.shape, image_shape[:2]
        return f"has {width} x {height} pixels, but its image {image_width} x {image_height}"
    unknown = [label for label in np.unique(labels).tolist() if label >= num_classes and label != ignored]
    if unknown:
        some = ", ".join(str(label + is_reduced) for label in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        classes, no_class = (f"1 to {num_classes}", "0 and 255") if is_reduced else (f"0 to {num_classes - 1}", ignored)
        return f"has pixels with the label {some}, but the labels are {classes}, and {no_class} for no class"
    return ""


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(LoadAnnotations):
    """MMSegmentation's loading step with an error that names an invalid mask, instead of a failed assertion on a GPU.

    Args:
        num_classes: Number of classes.
        ignored: Label of pixels without a class.
        others: Arguments of ``LoadAnnotations``.
    """

    def __init__(self, num_classes: int, ignored: int, **others: Any) -> None:
        super().__init__(**others)
        self._num_classes, self._ignored = num_classes, ignored

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        try:
            super()._load_seg_map(results)
        except OSError as error:
            raise DataError(f"{results['seg_map_path']}: cannot be read as a mask ({error}).") from error
        shape, known = results.get("ori_shape"), (self._num_classes, self._ignored)
        problem = problem_of(results["gt_seg_map"], shape, *known, bool(self.reduce_zero_label))
        if problem:
            raise DataError(f"{results['seg_map_path']}: {problem}.")


def loader_of(dataset: ConfigDict) -> LoadAnnotations:
    """Return the step of the data set's pipeline that loads masks."""
    steps = [step for step in settings_in(dataset.get("pipeline", [])) if step.get("type") == "LoadAnnotations"]
    options = {key: value for key, value in (steps[0] if steps else {}).items() if key not in ("type", "_scope_")}
    return LoadAnnotations(**options)
