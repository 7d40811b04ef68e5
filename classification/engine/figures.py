"""Images, figures and arrays of the analysis programs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor

from engine.model import Classifier, set_image_size
from mambavision.files import replacing


def load_image(file: Path, classifier: Classifier, device: torch.device) -> Tensor:
    """Return an image preprocessed for the model, (1, channels, height, width).

    Raises:
        DataError: It cannot be decoded.
    """
    return create_transform(**classifier.data_config)(classifier.open_image(file))[None].to(device)


def as_picture(image: Tensor, classifier: Classifier) -> np.ndarray:
    """Undo the normalisation of an image from `load_image`; return (height, width, 3)."""
    mean, std = (torch.tensor(classifier.data_config[key])[:, None, None] for key in ("mean", "std"))
    colours = (image[0].cpu() * std + mean).clamp(0, 1)
    return colours.expand(3, -1, -1).permute(1, 2, 0).numpy() if len(colours) == 1 else colours.permute(1, 2, 0).numpy()


def fit_image_size(classifier: Classifier) -> None:
    """Adapt the model to the image size of its data config."""
    set_image_size(classifier.model, classifier.data_config["input_size"][1:])


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, complete or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=100)


def save_arrays(arrays: dict[str, Any], path: Path) -> None:
    """Write arrays as a file for `numpy.load`, complete or not at all."""
    content = io.BytesIO()  # numpy seeks in what it writes
    np.savez_compressed(content, **arrays)
    with replacing(path) as file:
        file.write(content.getbuffer())
