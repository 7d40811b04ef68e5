"""Reading every layout of weights that the originals wrote, safely, and writing checkpoints.

Pickles are read by `mambavision.unpickling`, which runs nothing that they name. Only if a caller says that a file is
trusted, it is read by torch's own unpickler without restriction.
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
from mambavision.errors import CheckpointError
from mambavision.files import replacing
from mambavision.timm_model import TimmModel
from mambavision.unpickling import RefusedError

_logger = logging.getLogger(__name__)

# Where checkpoints keep weights, in the order in which the originals look.
WEIGHT_KEYS = ("state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")

# In front of the model's own keys: DistributedDataParallel, torch.compile, the hub's classification class, an encoder
# with its decoder, an OpenMMLab detector or segmentor.
_PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")


def read_checkpoint(path: str | os.PathLike, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU.

    Args:
        path: A safetensors file, or anything written by ``torch.save``.
        trust: Unpickle without restriction. That lets the file run any code: only for files whose author you trust.

    Returns:
        The dictionary in the file.

    Raises:
        CheckpointError: The file is missing, truncated, not a checkpoint at all, or holds objects that are not
            admitted.
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
        is_dense = str(error).startswith("mmengine.")
        kind = "is of a detector or segmentor, for tools/test.py of its task; here it is " if is_dense else ""
        raise CheckpointError(
            f"{path}: {kind}refused, because it holds objects other than weights and plain settings ({error}); "
            "if you trust its author, read it with trust=True (in classification: --trust-checkpoint)."
        ) from error
    except ImportError as error:
        raise CheckpointError(
            f"{path}: holds objects of {error.name}, which is not installed; without trust=True (--trust-checkpoint), "
            "weights and plain settings are read without it."
        ) from error
    except Exception as error:  # whatever a reader comes to in a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, probably truncated or damaged ({_first_sentence(error)}); "
            "download or copy it again."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights.")
    return dict(content)


def read_outline(path: str | os.PathLike) -> dict[str, Any] | None:
    """Read what a file of ``torch.save`` holds besides the data of its tensors: to compare files without reading all.

    That a file has an outline does not mean that its tensors are whole.

    Returns:
        The dictionary in the file, its tensors on the meta device; None if the file cannot be read as a checkpoint.
    """
    try:
        content = unpickling.load(Path(path), with_data=False)
    except Exception:  # whatever a reader comes to in a damaged file; `read_checkpoint` says what is wrong
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
            f"{path}: is a tar archive, as the first versions of PyTorch wrote; load it in PyTorch and save it again."
        )
    # A zip archive or a pickle by torch.save, or safetensors.
    if not (head.startswith((b"PK", b"\x80")) or _is_safetensors(head)):
        raise CheckpointError(f"{path}: is not a checkpoint; give a file of weights (.pth.tar, .pth or .safetensors).")


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # eight bytes of length, then JSON


def _first_sentence(error: Exception) -> str:
    """Return what is wrong, without the advice about torch.load that follows in torch's messages."""
    return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


def extract_state_dict(
    checkpoint: Mapping[str, Any], ema: bool = False, source: str = "checkpoint"
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint.

    Args:
        checkpoint: Content of a checkpoint: weights under ``state_dict`` or ``model``, or the weights themselves.
        ema: Take the exponential moving average of the weights instead.
        source: Name of the checkpoint for messages.

    Raises:
        CheckpointError: No weights there, or no average when it is asked for.
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
        raise CheckpointError(f"{source}: has weights without names ({nameless!r}), so it is of no model.")
    return state_dict


def in_layout_of(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries below the prefix of wrappers or larger models under which most keys are those of a model.

    Args:
        model: Whose keys they are to be. Its `convert_state_dict`, if it has one, translates from other layouts.
        state_dict: Weights as found in a file.
    """
    own = model.state_dict().keys()
    convert = getattr(model, "convert_state_dict", lambda entries: entries)
    candidates = ((prefix, convert(entries)) for prefix, entries in _below_prefixes(state_dict))
    prefix, below = max(candidates, key=lambda candidate: len(own & candidate[1].keys()))
    if left_out := len(state_dict) - len(below):
        _logger.info("took the %d entries below %r and left out %d others", len(below), prefix, left_out)
    return below


def _below_prefixes(state_dict: dict[str, Tensor], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every chain of prefixes, the empty one first, and the entries below it without it."""
    yield path, state_dict
    for prefix in _PREFIXES:
        below = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if below:
            yield from _below_prefixes(below, path + prefix)


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did: names of entries that found no counterpart."""

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
    """Load weights into a model; nothing is changed unless all of them fit.

    Args:
        model: The model, built with the same hyper-parameters as the one in the file.
        path: Checkpoint in any layout the originals wrote: weights under ``state_dict`` or ``model`` or bare; keys
            prefixed with ``module.``, ``encoder.`` or the hub's ``model.``; torch.save or safetensors.
        strict: Every key of the model must be in the file and the other way round. If False, whatever fits in name
            and shape is loaded.
        ema: Load the averaged weights (``state_dict_ema``).
        skip_head: Keep the model's own classifier, for a different number of classes.
        trust: See `read_checkpoint`.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: The file cannot be read or does not fit.
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
    """Do what `load_checkpoint` does with the content of a file read before; `source` names it in messages."""
    found = extract_state_dict(checkpoint, ema, source)
    return _load(model, found, in_layout_of(model, found), source, strict=strict, skip_head=skip_head)


def load_pretrained(model: TimmModel, path: str | os.PathLike) -> LoadReport:
    """Load released weights into a model that may have other classes or input channels.

    The classifier is left at its initialisation when the number of classes differs, and the first convolution is
    averaged or repeated over channels as timm does.
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
            "released weights are for %d classes: the classifier for %d starts untrained",
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
    """Load what was found in a file; `state_dict` is that in the layout of the model."""
    own = model.state_dict()
    head = _head_keys(model)
    # Training with --split-bn adds norm layers for augmented images, which nothing needs afterwards.
    state_dict = {key: value for key, value in state_dict.items() if key in own or ".aux_bn." not in key}
    if skip_head:
        state_dict = {key: value for key, value in state_dict.items() if key not in head}
    # Files of old torch versions have no batch counters; they play no part in the numbers.
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
            raise CheckpointError(
                f"{source}: is of a detector or segmentor ({others} beside its backbone), not of a classifier; score "
                "it with tools/test.py of its task, or take its backbone alone with strict=False (train.py "
                "--loadcheckpoint)."
            )
        raise CheckpointError(f"{source}: {_why_not(report, own, state_dict, head)}")
    if not fitting:
        raise CheckpointError(f"{source}: none of its {len(state_dict)} entries fits the model.")
    check_values(model, fitting, source)
    model.load_state_dict(fitting, strict=False)
    return report


def check_values(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError for entries that a model's own of the same names cannot take, or whose numbers are none.

    Args:
        model: The model.
        state_dict: Entries that fit it in name and shape.
        source: Names the checkpoint in messages.
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
            raise CheckpointError(f"{source}: {key} {kind}, and the model needs its plain values; save those.")
        if value.is_complex() != own.is_complex() or value.is_floating_point() != own.is_floating_point():
            raise CheckpointError(f"{source}: {key} holds {value.dtype} numbers, and the model {own.dtype} ones.")
        # A mask among the buffers may be infinite.
        if value.is_floating_point() and not _is_sound(value, may_be_infinite=key not in parameters):
            broken.append(key)
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} of its weights are not finite ({_some(broken)}), so its outputs mean nothing; "
            "take a checkpoint from before that."
        )


def _is_sound(value: Tensor, may_be_infinite: bool) -> bool:
    # 8-bit floats have no such test of their own.
    value = value.float() if value.itemsize == 1 else value
    return not bool((value.isnan() if may_be_infinite else ~value.isfinite()).any())


def _head_keys(model: nn.Module) -> set[str]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return {f"{classifier}.weight", f"{classifier}.bias"}


def _dense_parts(found: dict[str, Tensor]) -> str:
    """Return what a detector or segmentor has beside its backbone; empty if the weights are of neither."""
    parts = list(dict.fromkeys(key.split(".")[0] for key in found))
    others = [part for part in parts if part == "neck" or part.endswith("_head")]
    return ", ".join(others) if "backbone" in parts else ""


def _why_not(report: LoadReport, own: dict[str, Tensor], state_dict: dict[str, Tensor], head: set[str]) -> str:
    if report.reshaped and set(report.reshaped) <= head and not (report.missing or report.unexpected):
        theirs, ours = (weights[report.reshaped[0]].shape[0] for weights in (state_dict, own))
        return (
            f"its classifier has {theirs} classes, the model has {ours}; build the model with num_classes={theirs} "
            f"(--num-classes {theirs}), or keep the model's own classifier with skip_head=True (train.py --skip-head)."
        )
    return f"is of another model: {report}; the file has {len(state_dict)} entries, the model {len(own)}."


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(map(str, names[:count])) + (", ..." if len(names) > count else "") if names else "none"


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint so that `path` always holds a complete file: the previous one or the new one.

    Weights only (a flat dictionary of tensors) and a path ending in ``.safetensors`` give a safetensors file, anything
    else one for ``torch.load``.

    Raises:
        OutputError: The file cannot be written; names the path and the reason. Nothing is left behind.
    """
    write = _write_safetensors if str(path).endswith(".safetensors") else torch.save
    with replacing(path) as file:
        write(dict(checkpoint), file)


def _write_safetensors(tensors: dict[str, Tensor], file: io.BufferedWriter) -> None:
    file.write(safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}))
