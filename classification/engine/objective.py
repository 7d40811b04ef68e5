"""Training objective: loss, self-distillation and averaged weights."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import Tensor, nn

from engine.acceleration import compile_arguments
from engine.batches import mixup_is_on
from engine.options import TrainOptions

TEMPERATURE = 3.0
SCALE = 50.0  # on top of the weight that the user gives


class MesaTask(ClassificationTask):
    """Classification with MESA: self-distillation from the exponential moving average of the weights.

    Adds ``weight * 50 * KL(teacher || student)`` at temperature 3, averaged over the batch, as MambaVision was trained
    (method: Du et al. 2022, "Sharpness-Aware Training for Free", https://arxiv.org/abs/2205.14083).

    Args:
        model: The student.
        weight: Weight of the distillation term.
        **kwargs: See `timm.task.ClassificationTask`. `setup_ema` must be called before training.
    """

    def __init__(self, model: nn.Module, weight: float, **kwargs) -> None:
        super().__init__(model, **kwargs)
        self.weight = weight
        self.distilling = False  # switched on by the trainer after the first part of the schedule

    def setup_ema(self, *args, **kwargs) -> nn.Module:
        averaged = super().setup_ema(*args, **kwargs)
        averaged.requires_grad_(False)
        return averaged

    def train(self, mode: bool = True) -> "MesaTask":
        super().train(mode)
        teacher = self.get_trainable_module(ema=True)
        if teacher is not None:
            teacher.eval()  # timm keeps it as a submodule; its batch statistics and drop path must not be active
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        result = super().forward(input, target)
        if self.distilling:
            averaged = self.get_eval_model(ema=True)
            assert averaged is not None
            with torch.no_grad():
                teacher = averaged(input)
            student_log = F.log_softmax(result["output"].float() / TEMPERATURE, dim=1)
            teacher_probability = F.softmax(teacher.float() / TEMPERATURE, dim=1)
            divergence = F.kl_div(student_log, teacher_probability, reduction="batchmean")
            result["loss"] = result["loss"] + self.weight * SCALE * divergence
        return result


def build_task(options: TrainOptions, model: nn.Module, device: torch.device) -> ClassificationTask:
    """Create the objective, with averaged weights if they are enabled."""
    augmentation, averaging = options.augmentation, options.averaging
    loss = {
        "loss_type": "jsd" if augmentation.jsd_loss else "bce" if augmentation.bce_loss else "ce",
        "smoothing": augmentation.smoothing,
        "soft_targets": mixup_is_on(augmentation),
        "bce_target_thresh": augmentation.bce_target_thresh if augmentation.bce_loss else None,
        "jsd_splits": augmentation.aug_splits,
    }
    arguments: dict[str, Any] = {"criterion_kwargs": loss, "device": device, "verbose": False}
    task = MesaTask(model, averaging.mesa, **arguments) if averaging.mesa else ClassificationTask(model, **arguments)
    if compilation := compile_arguments(options.model.torchcompile, options.model.torchcompile_mode):
        task.compile(**compilation)
    if averaging.model_ema:
        on_cpu = torch.device("cpu") if averaging.model_ema_force_cpu else None
        task.setup_ema(decay=averaging.model_ema_decay, device=on_cpu)
    return task
