"""Which implementation of an operator runs, and why.

Every operator owns a list of implementations in order of preference. The first one that is available for the device
of the inputs and can compute them runs, unless the environment variable ``VISION_KERNELS_BACKEND`` names another: one
for all operators, as in ``reference``, or one for each, as in ``selective_scan=torch,ss2d=reference``. The choice is
logged once for each operator and device; ``python -m vision_kernels`` prints it.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vision_kernels import native

BACKEND_VARIABLE = "VISION_KERNELS_BACKEND"

_logger = logging.getLogger(__name__)


def _always_available() -> str | None:
    return None


def _always_able(*arguments: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        backend: Name under which ``VISION_KERNELS_BACKEND`` finds it.
        forward: Computes the outputs from validated inputs.
        backward: Computes the gradients of all inputs.
        summary: What it is, in a few words, for the overview.
        devices: Device types it runs on; empty means every device.
        why_unavailable: Returns the reason it cannot run on this machine together with the remedy, or None if it can.
        why_unable: Returns the reason it cannot compute these arguments of the operator, or None if it can.
    """

    backend: str
    forward: Callable
    backward: Callable
    summary: str
    devices: tuple[str, ...] = ()
    why_unavailable: Callable[[], str | None] = _always_available
    why_unable: Callable[..., str | None] = _always_able

    def runs_on(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices

    def why_not(self, arguments: tuple) -> str | None:
        """Return why it cannot run here, or not on these arguments if there are any; None if it can."""
        return self.why_unavailable() or (self.why_unable(*arguments) if arguments else None)


def compiled_for_cpu(forward: Callable, backward: Callable, why_unable: Callable) -> tuple[Implementation, ...]:
    """Return an implementation for each instruction set; `forward` and `backward` take its name first."""
    return tuple(
        Implementation(
            instruction_set,
            functools.partial(forward, instruction_set),
            functools.partial(backward, instruction_set),
            f"C++ for {processors}",
            devices=("cpu",),
            why_unavailable=functools.partial(native.why_unavailable, instruction_set),
            why_unable=why_unable,
        )
        for instruction_set, processors in native.INSTRUCTION_SETS.items()
    )


@dataclass
class Operator:
    """An operator and its implementations, best first."""

    name: str
    implementations: tuple[Implementation, ...]
    _announced: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self

    def named(self, backend: str) -> Implementation:
        """Return the implementation of this name."""
        return next(each for each in self.implementations if each.backend == backend)

    def select(self, device_type: str, *arguments: Any) -> Implementation:
        """Return the implementation that computes `arguments` of the operator, or most, if none are given.

        Raises:
            ValueError: ``VISION_KERNELS_BACKEND`` names a backend that this operator does not have, or that cannot
                run on this machine, device or arguments.
        """
        forced = self._forced_name()
        chosen = self._forced(forced, device_type, arguments) if forced else self._preferred(device_type, arguments)
        if (chosen.backend, device_type) not in self._announced:
            self._announced.add((chosen.backend, device_type))
            _logger.info("%s on %s: backend %r", self.name, device_type, chosen.backend)
        return chosen

    def _preferred(self, device_type: str, arguments: tuple) -> Implementation:
        for each in self.implementations:
            if each.runs_on(device_type) and each.why_not(arguments) is None:
                return each
        raise ValueError(f"{self.name}: no implementation runs on device {device_type!r}")

    def _forced_name(self) -> str:
        setting = os.environ.get(BACKEND_VARIABLE, "")
        if "=" not in setting:
            return setting
        pairs = dict(pair.partition("=")[::2] for pair in setting.split(","))
        unknown = [name for name in pairs if name not in OPERATORS]
        if unknown:
            raise ValueError(
                f"{BACKEND_VARIABLE}={setting}: there is no operator {unknown[0]}, only {', '.join(OPERATORS)}"
            )
        return pairs.get(self.name, "")

    def _forced(self, backend: str, device_type: str, arguments: tuple) -> Implementation:
        by_name = {implementation.backend: implementation for implementation in self.implementations}
        prefix = f"{BACKEND_VARIABLE}: {self.name}={backend}"
        if backend not in by_name:
            raise ValueError(f"{prefix}: this operator has the backends {', '.join(by_name)}")
        chosen = by_name[backend]
        if not chosen.runs_on(device_type):
            raise ValueError(f"{prefix}: runs on {', '.join(chosen.devices)}, the inputs are on {device_type}")
        reason = chosen.why_not(arguments)
        if reason is not None:
            raise ValueError(f"{prefix}: {reason}")
        return chosen


OPERATORS: dict[str, Operator] = {}


def overview() -> str:
    """Return a table of every operator's implementations and which of them is active on which device."""
    device_types = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"torch {torch.__version__}, devices: {', '.join(device_types)}"]
    for operator in OPERATORS.values():
        lines.append(f"\n{operator.name}")
        try:
            active = {device: operator.select(device).backend for device in device_types}
        except ValueError as error:
            lines.append(f"  {error}")
            continue
        for each in operator.implementations:
            on = [device for device, backend in active.items() if backend == each.backend]
            status = f"active on {', '.join(on)}" if on else each.why_unavailable() or "available"
            lines.append(f"  {each.backend:<10} {each.summary:<45} {status}")
    lines.append(f"\nSet {BACKEND_VARIABLE} to one of these names to force it.")
    return "\n".join(lines)
