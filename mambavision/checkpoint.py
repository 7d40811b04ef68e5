"""Safe reading of checkpoints in any layout of the original projects, and atomic writing.

Pickles are read by `mambavision.unpickling`, which never calls functions that a file names. torch's own
unpickler, which does, is used only for files that the caller trusts.
"""

import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mambavision import unpickling
from mambavision.errors import CheckpointError, DenseModelError, OtherClassesError, UntrustedContentError
from mambavision.files import replacing
from mambavision.timm_model import TimmModel
from mambavision.unpickling import RefusedError

_logger = logging.getLogger(__name__)

# Keys of weights in checkpoints, in the order in which the originals look for them.
WEIGHT_KEYS = ("state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")

# Prefixes of the model's own keys, added by DistributedDataParallel, torch.compile, the hub's classification class, a
# model with encoder and decoder, or an OpenMMLab detector or segmentor.
_PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")


def read_checkpoint(path: str | os.PathLike, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU.

    Args:
        path: A safetensors file, or anything written by ``torch.save``.
        trust: Unpickle without restriction. This lets the file run any code: use it for trusted files only.

    Returns:
        The dictionary in the file.

    Raises:
        CheckpointError: The file is missing, damaged or not a checkpoint.
        UntrustedContentError: The file contains objects other than weights and plain settings.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give a file in it.")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint (.pth.tar, .pth or .safetensors).")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        _refuse_other_content(path, head)
        content = _content(path, head, trust)
    except CheckpointError:
        raise
    except RefusedError as error:
        found = str(error)
        kind = "belongs to a detector or segmentor, and is " if found.startswith("mmengine.") else ""
        raise UntrustedContentError(
            f"{path}: {kind}refused, because it holds objects other than weights and plain settings ({found}); "
            "if you trust its author, read it with trust=True.",
            found,
        ) from error
    except ImportError as error:
        raise CheckpointError(
            f"{path}: holds objects of {error.name}, which is not installed; install it, or read the file without "
            "trust, which needs weights and plain settings only."
        ) from error
    except Exception as error:  # damaged files raise any error
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, probably truncated or damaged ({_first_sentence(error)}); "
            "download or copy it again."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights.")
    return dict(content)


def read_outline(path: str | os.PathLike) -> dict[str, Any] | None:
    """Read a file of ``torch.save`` without the data of its tensors, to compare files quickly.

    The data of the tensors may be damaged nevertheless.

    Returns:
        The dictionary in the file, with tensors on the meta device; None if the file cannot be read as a checkpoint.
    """
    try:
        content = unpickling.load(Path(path), with_data=False)
    except Exception:  # damaged files raise any error; `read_checkpoint` explains it
        return None
    return content if isinstance(content, dict) else None


def _content(path: Path, head: bytes, trust: bool) -> Any:
    if _is_safetensors(head):
        return safetensors.torch.load_file(path, device="cpu")
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False)
    return unpickling.load(path)


def _refuse_other_content(path: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: is a web page, not a checkpoint; the download link probably needs a login.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`.")
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: is a tar archive, the format of the first versions of PyTorch; load and save it with PyTorch."
        )
    # A zip archive or a pickle by torch.save, or safetensors.
    if not (head.startswith((b"PK", b"\x80")) or _is_safetensors(head)):
        raise CheckpointError(f"{path}: is not a checkpoint; give a weight file (.pth.tar, .pth or .safetensors).")


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # eight bytes of length, then JSON


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of an error; torch's messages continue with advice about torch.load."""
    return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


def extract_state_dict(
    checkpoint: Mapping[str, Any], ema: bool = False, source: str = "checkpoint"
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint.

    Args:
        checkpoint: Content of a checkpoint: weights under ``state_dict`` or ``model``, or the weights themselves.
        ema: Return the exponential moving average of the weights instead.
        source: Name of the checkpoint in error messages.

    Raises:
        CheckpointError: There are no weights, or no averaged weights if `ema` is set.
    """
    if ema:
        found = next((checkpoint[key] for key in EMA_KEYS if isinstance(checkpoint.get(key), Mapping)), None)
        if found is None:
            raise CheckpointError(f"{source}: has no averaged weights ({' or '.join(EMA_KEYS)}); load it without EMA.")
    else:
        found = next((checkpoint[key] for key in WEIGHT_KEYS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    state_dict = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not state_dict:
        raise CheckpointError(f"{source}: has no weights inside; its entries are {_some(checkpoint)}.")
    nameless = next((key for key in state_dict if not isinstance(key, str)), None)
    if nameless is not None:
        raise CheckpointError(f"{source}: has weights without names ({nameless!r}), so it belongs to no model.")
    return state_dict


def in_layout_of(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of a model, without the prefixes of wrappers and larger models.

    Of all prefixes in the file, the one under which most names belong to the model is removed; entries without it are
    dropped.

    Args:
        model: The model. Its `convert_state_dict`, if it has one, translates from other layouts.
        state_dict: Weights as in the file.
    """
    own = model.state_dict().keys()
    convert = getattr(model, "convert_state_dict", lambda entries: entries)
    candidates = ((prefix, convert(entries)) for prefix, entries in _below_prefixes(state_dict))
    prefix, below = max(candidates, key=lambda candidate: len(own & candidate[1].keys()))
    if left_out := len(state_dict) - len(below):
        _logger.info("using the %d entries below %r, ignoring %d others", len(below), prefix, left_out)
    return below


def _below_prefixes(state_dict: dict[str, Tensor], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every chain of prefixes, starting with the empty one, and the entries below it under their own names."""
    yield path, state_dict
    for prefix in _PREFIXES:
        below = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if below:
            yield from _below_prefixes(below, path + prefix)


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_checkpoint`: the number of loaded entries, and the names of the others."""

    loaded: int
    missing: tuple[str, ...]  # in the model, not in the file
    unexpected: tuple[str, ...]  # in the file, not in the model
    reshaped: tuple[str, ...]  # in both, with different shapes

    def __str__(self) -> str:
        return (
            f"{self.loaded} entries loaded, {len(self.missing)} missing ({_some(self.missing)}), "
            f"{len(self.unexpected)} unexpected ({_some(self.unexpected)}), "
            f"{len(self.reshaped)} of another shape ({_some(self.reshaped)})"
        )


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    strict: bool = True,
    ema: bool = False,
    skip_head: bool = False,
    trust: bool = False,
) -> LoadReport:
    """Load weights into a model, which stays unchanged unless all of them fit.

    Args:
        model: The model, built with the same hyper-parameters as the one in the file.
        path: Checkpoint in any layout of the originals: weights under ``state_dict`` or ``model`` or at the top level;
            names with the prefix ``module.``, ``encoder.`` or the hub's ``model.``; torch.save or safetensors.
        strict: Require the same names and shapes in file and model. If False, load the entries that fit.
        ema: Load the averaged weights (``state_dict_ema``).
        skip_head: Keep the model's own classifier, for a different number of classes.
        trust: Unpickle without restriction, see `read_checkpoint`.

    Returns:
        The number of loaded entries, and the names of those that do not fit.

    Raises:
        CheckpointError: The file cannot be read or does not fit.
        UntrustedContentError: The file contains objects other than weights and plain settings.
        OtherClassesError: Only the number of classes differs.
        DenseModelError: The file belongs to a detector or segmentor, and the model is a classifier.
    """
    return load_weights(model, read_checkpoint(path, trust), str(path), strict=strict, ema=ema, skip_head=skip_head)


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str,
    *,
    strict: bool = True,
    ema: bool = False,
    skip_head: bool = False,
) -> LoadReport:
    """Load weights as `load_checkpoint` does, from the content of a file; `source` names it in error messages."""
    found = extract_state_dict(checkpoint, ema, source)
    return _load(model, found, in_layout_of(model, found), source, strict=strict, skip_head=skip_head)


def load_pretrained(model: TimmModel, path: str | os.PathLike) -> LoadReport:
    """Load released weights into a model that may have other classes or input channels.

    The classifier keeps its initial weights if the number of classes differs. The weights of the first convolution are
    averaged or repeated over the channels as in timm.
    """
    config = model.pretrained_cfg
    found = extract_state_dict(read_checkpoint(path), source=str(path))
    state_dict = in_layout_of(model, found)
    first = config["first_conv"] + ".weight"
    channels = model.get_parameter(first).shape[1]
    if first in state_dict and state_dict[first].shape[1] != channels:
        state_dict[first] = adapt_input_conv(channels, state_dict[first])
    new_head = model.num_classes != config["num_classes"]
    if new_head:
        _logger.warning(
            "the released weights are for %d classes: the classifier for %d classes starts untrained",
            config["num_classes"],
            model.num_classes,
        )
    return _load(model, found, state_dict, str(path), strict=True, skip_head=new_head)


def _load(
    model: nn.Module,
    found: dict[str, Tensor],
    state_dict: dict[str, Tensor],
    source: str,
    *,
    strict: bool,
    skip_head: bool,
) -> LoadReport:
    """Load weights: `found` with the names of the file, `state_dict` with those of the model."""
    own = model.state_dict()
    head = _head_keys(model)
    # timm's split batch norms have further layers for augmented images, which only training needs.
    state_dict = {key: value for key, value in state_dict.items() if key in own or ".aux_bn." not in key}
    if skip_head:
        state_dict = {key: value for key, value in state_dict.items() if key not in head}
    # Files of old torch versions have no batch counters, which do not affect outputs.
    expected = [key for key in own if not key.endswith("num_batches_tracked") and not (skip_head and key in head)]
    fitting = {key: value for key, value in state_dict.items() if key in own and value.shape == own[key].shape}
    report = LoadReport(
        loaded=len(fitting),
        missing=tuple(key for key in expected if key not in state_dict),
        unexpected=tuple(key for key in state_dict if key not in own),
        reshaped=tuple(key for key in state_dict if key in own and key not in fitting),
    )
    if strict and (report.missing or report.unexpected or report.reshaped):
        if head <= own.keys() and (others := _dense_parts(found)):
            raise DenseModelError(
                f"{source}: belongs to a detector or segmentor ({others} beside its backbone), not to a classifier; "
                "load its backbone alone with strict=False."
            )
        raise _misfit(report, own, state_dict, head, source)
    if not fitting:
        raise CheckpointError(f"{source}: none of its {len(state_dict)} entries fits the model.")
    check_values(model, fitting, source)
    model.load_state_dict(fitting, strict=False)
    return report


def check_values(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError for weights of an incompatible type, or with numbers that are not finite.

    Args:
        model: The model.
        state_dict: Entries that fit it in name and shape.
        source: Name of the checkpoint in error messages.
    """
    parameters = {name for name, _ in model.named_parameters()}
    broken = []
    for key, own in model.state_dict().items():
        if key not in state_dict:
            continue
        value = state_dict[key]
        if own.is_meta:
            raise CheckpointError(f"{source}: cannot be loaded into a model on the meta device; create it on another.")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "is on the meta device" if value.is_meta else "is sparse or quantized"
            raise CheckpointError(f"{source}: {key} {kind}, but the model needs dense values; save those instead.")
        if value.is_complex() != own.is_complex() or value.is_floating_point() != own.is_floating_point():
            raise CheckpointError(f"{source}: {key} holds {value.dtype} numbers, and the model {own.dtype} ones.")
        # A mask among the buffers may be infinite.
        if value.is_floating_point() and not _is_sound(value, may_be_infinite=key not in parameters):
            broken.append(key)
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} of its weights are not finite ({_some(broken)}), so its outputs would not be "
            "either; use an earlier checkpoint."
        )


def _is_sound(value: Tensor, may_be_infinite: bool) -> bool:
    # torch has no isfinite for 8-bit floats.
    value = value.float() if value.itemsize == 1 else value
    return not bool((value.isnan() if may_be_infinite else ~value.isfinite()).any())


def _head_keys(model: nn.Module) -> set[str]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return {f"{classifier}.weight", f"{classifier}.bias"}


def _dense_parts(found: dict[str, Tensor]) -> str:
    """Return the parts of a detector or segmentor beside its backbone; empty for other models."""
    parts = list(dict.fromkeys(key.split(".")[0] for key in found))
    others = [part for part in parts if part == "neck" or part.endswith("_head")]
    return ", ".join(others) if "backbone" in parts else ""


def _misfit(
    report: LoadReport, own: dict[str, Tensor], state_dict: dict[str, Tensor], head: set[str], source: str
) -> CheckpointError:
    """Return the error for weights that do not fit a model with the weights `own`."""
    if set(report.reshaped) <= head and not (report.missing or report.unexpected):
        theirs, ours = (weights[report.reshaped[0]].shape[0] for weights in (state_dict, own))
        return OtherClassesError(
            f"{source}: its classifier has {theirs} classes, the model has {ours}; build the model with "
            f"num_classes={theirs}, or keep the model's own classifier with skip_head=True.",
            theirs,
        )
    return CheckpointError(
        f"{source}: belongs to another model: {report}; the file has {len(state_dict)} entries, the model {len(own)}."
    )


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(map(str, names[:count])) + (", ..." if len(names) > count else "") if names else "none"


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint atomically: `path` always contains a complete file, the previous one or the new one.

    Args:
        checkpoint: Content of the file.
        path: A name that ends in ``.safetensors`` selects that format, for a flat dictionary of tensors; any other
            name selects ``torch.save``.

    Raises:
        OutputError: The file cannot be written; no partial file remains.
    """
    write = _write_safetensors if str(path).endswith(".safetensors") else torch.save
    with replacing(path) as file:
        write(dict(checkpoint), file)


def _write_safetensors(tensors: dict[str, Tensor], file: io.BufferedWriter) -> None:
    file.write(safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}))
