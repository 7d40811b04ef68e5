"""Call operators directly with invalid arguments: `python hostile_calls.py NAME...`, a process that may crash.

Tensors end at the end of readable memory, so that reading beyond them is a crash. Every call must return tensors with
the shapes promised for tensors without data, or raise a ValueError or RuntimeError in both cases.
"""

import ctypes
import itertools
import mmap
import random
import sys
from collections.abc import Iterator

import torch
from samples import sample, schema

import vision_kernels  # noqa: F401 - registers the operators

_DTYPES = (torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (-(2**62), -2, -1, 0, 1, 2, 4, 2**31, 2**62)
_COMBINATIONS = 150
_protect = ctypes.CDLL(None).mprotect
_mappings = []


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the very end of readable memory."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _protect(ctypes.c_void_p(start + readable), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    _mappings.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=readable - size)
    return copy.view(tensor.shape).copy_(tensor)


def hostile_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, object]]:
    """Yield replacements of a tensor, most of them invalid, each with a description."""
    for dim, size in enumerate(tensor.shape):
        for other in (0, 1, size - 1, size + 1, 2 * size):
            shape = [*tensor.shape[:dim], other, *tensor.shape[dim + 1 :]]
            yield f"size {other} in dimension {dim}", guarded(torch.ones(shape, dtype=tensor.dtype))
    yield "size 2**40 in dimension 0", tensor[:1].expand(2**40, *tensor.shape[1:])
    yield "one dimension more", tensor.unsqueeze(0)
    yield "one dimension less", tensor[0]
    yield "a scalar", tensor.new_ones(())
    yield "flat", tensor.flatten()
    yield "transposed", tensor.transpose(0, -1)
    yield "expanded", tensor.new_ones(()).expand(tensor.shape)
    yield "overlapping", tensor.as_strided(tensor.shape, [1] * tensor.ndim)
    for dtype in _DTYPES:
        yield str(dtype), guarded(tensor.to(dtype))
    yield "on meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "of mkldnn", tensor.to_mkldnn()
    yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)
    yield "None", None
    yield "a number", 1.5


def hostile(argument: object, kind: str) -> list[tuple[str, object]]:
    """Return replacements of an argument, each with a description."""
    if isinstance(argument, torch.Tensor):
        return list(hostile_tensors(argument))
    if isinstance(argument, torch.dtype):
        return [(str(each), each) for each in (*_DTYPES, torch.quint8, torch.int64)] + [("None", None)]
    if isinstance(argument, str):
        return [(repr(each), each) for each in ("", "diagonal", "cross\0", None, 1)]
    assert isinstance(argument, int), f"no hostile values for {kind}"
    return [(str(each), each) for each in (*_INTEGERS, None, "cross")]


def calls(name: str) -> Iterator[tuple[str, list]]:
    """Yield arguments with one hostile value each, then some with two or three, each with a description."""
    arguments = [guarded(each) if isinstance(each, torch.Tensor) else each for each in sample(name)]
    yield "valid", arguments
    choices = [
        [(position, f"{formal.name} {what}", value) for what, value in hostile(argument, str(formal.type))]
        for position, (formal, argument) in enumerate(zip(schema(name).arguments, arguments, strict=True))
    ]
    generator = random.Random(0)
    several = []
    for _ in range(_COMBINATIONS):
        chosen = generator.sample(choices, min(len(choices), generator.choice((2, 3))))
        several.append([generator.choice(each) for each in chosen])
    for changes in itertools.chain(([each] for each in itertools.chain(*choices)), several):
        changed = list(arguments)
        for position, _, value in changes:
            changed[position] = value
        yield ", ".join(what for _, what, _ in changes), changed


def outcome(name: str, arguments: list) -> object:
    """Return the shapes, dtypes and strides of the results, or the kind of error."""
    refusal = None
    try:
        results = getattr(torch.ops.vision_kernels, name)(*arguments)
    except (ValueError, RuntimeError) as error:
        refusal = error
    if refusal is not None:
        sentence = str(refusal)
        if "can't allocate memory" in sentence:
            return "too large"
        assert name.removesuffix("_backward") in sentence, f"does not say where: {sentence}"
        # The dispatcher's own messages have several lines.
        assert not isinstance(refusal, ValueError) or "\n" not in sentence, f"not one sentence: {sentence}"
        return "refused"
    results = (results,) if isinstance(results, torch.Tensor) else results
    return [(each.shape, each.dtype, _strides_that_matter(each)) for each in results]


def _strides_that_matter(tensor: torch.Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def without_data(argument: object) -> object:
    """Return a tensor on meta instead of a plain one; other arguments are returned unchanged."""
    plain = isinstance(argument, torch.Tensor) and argument.layout is torch.strided and not argument.is_quantized
    if not plain:
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")


def main(name: str) -> None:
    count = 0
    for what, arguments in calls(name):
        print(f"{name}: {what}", flush=True)  # the last line names the call that crashed
        found = outcome(name, arguments)
        on_meta = any(isinstance(each, torch.Tensor) and each.is_meta for each in arguments)
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        if not on_meta and all(each.layout is torch.strided and not each.is_quantized for each in tensors):
            promised = outcome(name, [without_data(each) for each in arguments])
            assert found in (promised, "too large"), f"{found}, but {promised} without data"
        count += 1
    print(f"{name}: {count} calls survived")


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
