"""Time the published package `mambavision` for gpu.py, in a separate process because it has the same name as ours.

Reads questions, one JSON object per line, and writes answers: {"do": "prepare", "model", "batch", "mode": "inference"
or "training", "warm_up"} -> 0; {"do": "time", "calls"} -> milliseconds of a call.
"""

import json
import os
import sys
from collections.abc import Callable

import torch
from gpu import gpu_ms, inference, random_images, training_step

from mambavision import create_model


def prepared(model: str, batch: int, mode: str, warm_up: int) -> Callable[[], object]:
    training, images = mode == "training", random_images(batch)
    network = create_model(model).cuda().train(training).to(memory_format=torch.channels_last)
    run = training_step(network, images) if training else inference(network, images)
    for _ in range(warm_up):
        run()
    torch.cuda.synchronize()
    return run


def main() -> None:
    torch.backends.cudnn.benchmark = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the package's own output is not an answer
    for line in sys.stdin:
        question = json.loads(line)
        if question.pop("do") == "prepare":
            run = prepared(**question)
            answer = 0
        else:
            answer = gpu_ms(run, **question)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
