"""Selection of operator implementations.

Every operator has a list of implementations in order of preference. The first one that runs on the device of the inputs
and supports the arguments is used, unless the environment variable ``VISION_KERNELS_BACKEND`` names another: one for
all operators, as in ``reference``, or one for each, as in ``selective_scan=torch,ss2d=reference``. The choice is logged
once for each operator and device; ``python -m vision_kernels`` prints it.

An operator may also be composed of others. If a backend is named for all operators and this operator has none of that
name, or it cannot run, the operator is composed and the name applies to its parts.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
        forward: Computes the result from validated arguments. Its dtype and strides may be any: the operator converts.
        backward: Computes the gradients of all tensors from that of the result, likewise; None for an absent tensor.
            No function at all if another operator computes the gradients.
        summary: A few words for the overview.
        devices: Device types it runs on; empty means every device.
        why_unavailable: Returns the reason it cannot run on this machine together with the remedy, or None if it can.
        why_unable: Returns the reason it does not support these arguments of the operator, or None if it does.
        only_if_named: Runs only if ``VISION_KERNELS_BACKEND`` names it, regardless of its place in the list.
    """

    backend: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, ...]] | None
    summary: str
    devices: tuple[str, ...] = ()
    why_unavailable: Callable[[], str | None] = _always_available
    why_unable: Callable[..., str | None] = _always_able
    only_if_named: bool = False

    def runs_on(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices

    def why_not(self, arguments: tuple) -> str | None:
        """Return why it cannot run here, or with these arguments if there are any; None if it can."""
        return self.why_unavailable() or (self.why_unable(*arguments) if arguments else None)


@dataclass
class Operator:
    """An operator and its implementations, best first.

    Attributes:
        name: Name under which ``VISION_KERNELS_BACKEND`` finds it.
        implementations: All of them, in order of preference.
        composition: Name of the implementation that calls other operators, or None.
    """

    name: str
    implementations: tuple[Implementation, ...]
    composition: str | None = None
    _announced: set[tuple[str, str]] = field(default_factory=set, repr=False)
    _available: dict[str, tuple[Implementation, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self

    def named(self, backend: str) -> Implementation:
        """Return the implementation of this name."""
        return next(each for each in self.implementations if each.backend == backend)

    def select(self, device_type: str, *arguments: Any) -> Implementation:
        """Return the implementation for `arguments` of the operator; without arguments, the preferred one.

        Raises:
            ValueError: ``VISION_KERNELS_BACKEND`` names a backend that this operator does not have, or that cannot
                run on this machine, device or arguments.
        """
        chosen = self.forced()
        if chosen is None:
            chosen = self._preferred(device_type, arguments)
        elif reason := _why_not_on(device_type, chosen, arguments):
            composed = self._composed_instead()
            if composed is None:
                raise ValueError(f"{BACKEND_VARIABLE}: {self.name}={chosen.backend}: {reason}")
            chosen = composed
        if (chosen.backend, device_type) not in self._announced:
            self._announced.add((chosen.backend, device_type))
            _logger.info("%s on %s: backend %r", self.name, device_type, chosen.backend)
        return chosen

    def forced(self) -> Implementation | None:
        """Return the implementation that ``VISION_KERNELS_BACKEND`` names, or None if it names none.

        Raises:
            ValueError: It names a backend that this operator does not have or that cannot run on this machine, or an
                operator that does not exist.
        """
        setting = os.environ.get(BACKEND_VARIABLE, "")
        backend = _choices(setting).get(self.name, "") if "=" in setting else setting
        if not backend:
            return None
        names = [each.backend for each in self.implementations]
        if backend not in names:
            if composed := self._composed_instead():
                return composed
            raise ValueError(
                f"{BACKEND_VARIABLE}: {self.name}={backend}: this operator has the backends {', '.join(names)}"
            )
        chosen = self.named(backend)
        if reason := chosen.why_unavailable():
            raise ValueError(f"{BACKEND_VARIABLE}: {self.name}={backend}: {reason}")
        return chosen

    def _composed_instead(self) -> Implementation | None:
        """Return the composition if ``VISION_KERNELS_BACKEND`` names one backend for all operators, otherwise None."""
        if self.composition is None or "=" in os.environ.get(BACKEND_VARIABLE, ""):
            return None
        return self.named(self.composition)

    def _available_on(self, device_type: str) -> tuple[Implementation, ...]:
        # Looked up in every call; the answer does not change while a process runs.
        if device_type not in self._available:
            self._available[device_type] = tuple(
                each
                for each in self.implementations
                if each.runs_on(device_type) and not each.only_if_named and each.why_unavailable() is None
            )
        return self._available[device_type]

    def _preferred(self, device_type: str, arguments: tuple) -> Implementation:
        for each in self._available_on(device_type):
            if not arguments or each.why_unable(*arguments) is None:
                return each
        raise ValueError(f"{self.name}: no implementation runs on device {device_type!r}")


def _why_not_on(device_type: str, chosen: Implementation, arguments: tuple) -> str | None:
    if not chosen.runs_on(device_type):
        return f"runs on {', '.join(chosen.devices)}, the inputs are on {device_type}"
    return chosen.why_not(arguments)


def _choices(setting: str) -> dict[str, str]:
    """Read "operator=backend,operator=backend"."""
    pairs = dict(pair.partition("=")[::2] for pair in setting.split(","))
    unknown = [name for name in pairs if name not in OPERATORS]
    if unknown:
        known = ", ".join(OPERATORS)
        raise ValueError(f"{BACKEND_VARIABLE}={setting}: there is no operator {unknown[0]}, only {known}")
    return pairs


OPERATORS: dict[str, Operator] = {}


def check_forced_backend() -> None:
    """Raise a ValueError if ``VISION_KERNELS_BACKEND`` names a backend that cannot run on this machine."""
    for operator in OPERATORS.values():
        operator.forced()


def overview() -> str:
    """Return a table of every operator's implementations that shows which one is active on each device."""
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
