"""Memory of the C++ kernels: `threads` prints how much many threads leave behind, `limits SET...` what runs out of it.

The environment variable VISION_KERNELS_BACKEND chooses the instruction set of `threads`.
"""

import os
import resource
import sys
import threading

import torch

from vision_kernels import conv1d_silu, cross_merge, cross_scan, neighborhood_attention, selective_scan, ss2d
from vision_kernels.backends import BACKEND_VARIABLE

MILLION = 1 << 20
ADDRESS_SPACE, RESIDENT = 0, 1  # fields of /proc/self/statm
operators = torch.ops.vision_kernels


def ones(*shape):
    return torch.ones(shape, requires_grad=True)


def scan_arguments(dim, length, states):
    sequences = ones(1, dim, length), ones(1, dim, length), ones(dim, states)
    return *sequences, *(torch.ones(1, 1, states, 1).expand(1, 1, states, length) for _ in range(2))


def ss2d_arguments(side):
    return ones(1, 4, side, side), ones(4, 3, 4), ones(4, 4, 1), ones(4, 4), ones(16, 1), ones(16)


# Every operator in a size that fits into any memory.
SMALL = [
    lambda: conv1d_silu(ones(1, 40, 64), ones(64, 3)),
    lambda: cross_merge(cross_scan(ones(1, 4, 17, 18)), 17, 18),
    lambda: selective_scan(*scan_arguments(16, 100, 8)),
    lambda: ss2d(*ss2d_arguments(12)),
    lambda: neighborhood_attention(*(ones(1, 2, 16, 17, 32) for _ in range(3)), 7, bias=ones(2, 13, 13)),
]


def run_small():
    """Run every operator forward and backward."""
    for call in SMALL:
        call().sum().backward()


def large_calls():
    """Return calls whose kernels need more memory than their arguments, each with the kernel's name."""
    few = torch.ones(1, 2 * MILLION)
    weight = few[0, : MILLION // 4, None].expand(MILLION // 4, 512)
    window = 2401
    maps, bias = [torch.ones(1, 1, window, window, 1)] * 3, torch.ones(1, 2 * window - 1, 2 * window - 1)
    many = [torch.ones(2048, 1, 63, 63, 1)] * 3
    sequences = torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, MILLION), *[torch.ones(1, 1, MILLION, 2)] * 2
    image = torch.ones(1, 1, 1200, 1200)
    images = image, torch.ones(1, 1, 1, 1).expand(1, 1440000, 4, 3).contiguous()
    images += tuple(torch.ones(shape) for shape in [(4, 1, 1), (4, 1), (4, 1), (4,)])
    attention_backward = operators.neighborhood_attention_backward
    return [
        ("conv1d_silu_forward", lambda: conv1d_silu(few[:, None, : MILLION // 4], weight)),
        ("selective_scan_forward", lambda: selective_scan(*sequences)),
        (
            "selective_scan_backward",
            lambda: operators.selective_scan_backward(sequences[0], *sequences, None, None, False, False),
        ),
        ("ss2d_forward", lambda: operators.ss2d(*images, "cross", torch.float32)),
        ("ss2d_backward", lambda: operators.ss2d_backward(image, *images, "cross")),
        ("neighborhood_attention_forward", lambda: neighborhood_attention(*maps, window, bias=bias)),
        ("neighborhood_attention_backward", lambda: attention_backward(maps[0], *maps, None, window, 1)),
        (
            "neighborhood_attention_backward",
            lambda: attention_backward(many[0], *many, torch.ones(1, 125, 125), 63, 1),
        ),
        # A product of sizes that overflows any integer.
        ("conv1d_silu_forward", lambda: conv1d_silu(torch.ones(1, 1, 1), torch.ones(1, 1).expand(1, 1 << 62))),
    ]


def size_of(field):
    """Return a size of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()


def threads():
    """Print by how many bytes 200 threads that ran every operator have enlarged the process."""

    def work(count):
        for _ in range(count):
            thread = threading.Thread(target=run_small)
            thread.start()
            thread.join()

    torch.set_num_threads(1)
    work(20)
    before = size_of(RESIDENT)
    work(200)
    print(size_of(RESIDENT) - before)


def limits(instruction_sets):
    """Print instruction set, kernel and outcome of each large call with little memory; then everything works again."""
    torch.set_num_threads(2)
    for instruction_set in instruction_sets:
        os.environ[BACKEND_VARIABLE] = instruction_set
        run_small()  # starts the threads, and allocates what they keep
        for kernel, call in large_calls():
            resource.setrlimit(resource.RLIMIT_AS, (size_of(ADDRESS_SPACE) + 128 * MILLION, -1))
            outcome = "ran"
            try:
                with torch.no_grad():
                    call()
            except MemoryError as error:
                outcome = str(error)
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            print(instruction_set, kernel, outcome)
            run_small()


if __name__ == "__main__":
    if sys.argv[1] == "threads":
        threads()
    else:
        limits(sys.argv[2:])
