"""Memory of the C++ kernels: freed with its thread, and an error where there is none. In processes of their own."""

import os
import subprocess
import sys

import pytest

from vision_kernels import native
from vision_kernels.backends import BACKEND_VARIABLE

AVAILABLE = [name for name in native.INSTRUCTION_SETS if native.why_unavailable(name) is None]
pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs the C++ kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# Every operator, forward and backward, in sizes that fit into any memory.
OPERATORS = """
import resource
import threading

import torch

from vision_kernels import conv1d_silu, cross_merge, cross_scan, neighborhood_attention, selective_scan, ss2d


def ones(*shape):
    return torch.ones(shape, requires_grad=True)


def scan_arguments(dim, length, states):
    sequences = ones(1, dim, length), ones(1, dim, length), ones(dim, states)
    return *sequences, *(torch.ones(1, 1, states, 1).expand(1, 1, states, length) for _ in range(2))


def ss2d_arguments(side):
    return ones(1, 4, side, side), ones(4, 3, 4), ones(4, 4, 1), ones(4, 4), ones(16, 1), ones(16)


small = {
    "conv1d_silu": lambda: conv1d_silu(ones(1, 40, 64), ones(64, 3)),
    "cross_scan": lambda: cross_merge(cross_scan(ones(1, 4, 17, 18)), 17, 18),
    "selective_scan": lambda: selective_scan(*scan_arguments(16, 100, 8)),
    "ss2d": lambda: ss2d(*ss2d_arguments(12)),
    "neighborhood_attention": lambda: neighborhood_attention(
        *(ones(1, 2, 16, 17, 32) for _ in range(3)), 7, bias=ones(2, 13, 13)
    ),
}


def run(each):
    each().sum().backward()


def size_of(field):  # of this process in bytes: 0 is the address space, 1 what is in memory
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()
"""

MANY_THREADS = """
def work(count):
    for _ in range(count):
        thread = threading.Thread(target=lambda: [run(each) for each in small.values()])
        thread.start()
        thread.join()


torch.set_num_threads(1)
work(20)
before = size_of(1)
work(200)
print(size_of(1) - before)
"""

NO_MEMORY = """
million = 1 << 20
few = torch.ones(1, 2 * million)
weight = few[0, : million // 4, None].expand(million // 4, 512)
window = 2401
maps, bias = [torch.ones(1, 1, window, window, 1)] * 3, torch.ones(1, 2 * window - 1, 2 * window - 1)
many = [torch.ones(2048, 1, 63, 63, 1)] * 3
sequences = torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, million), *[torch.ones(1, 1, million, 2)] * 2
image = torch.ones(1, 1, 1200, 1200)
images = image, torch.ones(1, 1, 1, 1).expand(1, 1440000, 4, 3).contiguous()
images += tuple(torch.ones(shape) for shape in [(4, 1, 1), (4, 1), (4, 1), (4,)])
operators = torch.ops.vision_kernels
large = {
    "conv1d_silu_forward": lambda: conv1d_silu(few[:, None, : million // 4], weight),
    "selective_scan_forward": lambda: selective_scan(*sequences),
    "selective_scan_backward": lambda: operators.selective_scan_backward(
        sequences[0], *sequences, None, None, False, False
    ),
    "ss2d_forward": lambda: operators.ss2d(*images, "cross", torch.float32),
    "ss2d_backward": lambda: operators.ss2d_backward(image, *images, "cross"),
    "neighborhood_attention_forward": lambda: neighborhood_attention(*maps, window, bias=bias),
    "neighborhood_attention_backward": lambda: operators.neighborhood_attention_backward(
        maps[0], *maps, None, window, 1
    ),
    "neighborhood_attention_backward ": lambda: operators.neighborhood_attention_backward(
        many[0], *many, torch.ones(1, 125, 125), 63, 1
    ),
    # A product of sizes that no integer holds.
    "conv1d_silu_forward ": lambda: conv1d_silu(torch.ones(1, 1, 1), torch.ones(1, 1).expand(1, 1 << 62)),
}
torch.set_num_threads(2)
for each in small.values():  # threads and what they keep
    run(each)
for name, each in large.items():
    resource.setrlimit(resource.RLIMIT_AS, (size_of(0) + 128 * million, -1))
    try:
        with torch.no_grad():
            each()
        print(name, "ran")
    except MemoryError as error:
        assert str(error) == f"{name.strip()}: out of memory; compute fewer images at a time or smaller ones", error
        print(name.strip())
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    for each in small.values():
        run(each)
"""


def output(program, instruction_set):
    environment = os.environ | {BACKEND_VARIABLE: instruction_set, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", OPERATORS + program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_memory_is_freed_with_its_thread():
    (grown,) = output(MANY_THREADS, AVAILABLE[0])
    assert int(grown) < 200 * 20_000  # each thread used more than ten times as much


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_running_out_of_memory_is_an_error(instruction_set):
    lines = output(NO_MEMORY, instruction_set)
    assert len(lines) == 9
    assert not [line for line in lines if line.endswith("ran")]
