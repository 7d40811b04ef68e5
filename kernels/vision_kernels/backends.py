"""Which implementation of an operator runs, and why.

Every operator owns a list of implementations in order of preference. The first one that is available for the device
of the inputs and can compute them runs, unless the environment variable ``VISION_KERNELS_BACKEND`` names another: one
for all operators, as in ``reference``, or one for each, as in ``selective_scan=torch,ss2d=reference``. The choice is
logged once for each operator and device; ``python -m vision_kernels`` prints it.

An operator may also be composed of others. A backend named for all operators is then that of its parts, wherever the
operator itself has none of this name that can run.
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
        backward: Computes the gradients of all inputs; None if another operator does.
        summary: What it is, in a few words, for the overview.
        devices: Device types it runs on; empty means every device.
        why_unavailable: Returns the reason it cannot run on this machine together with the remedy, or None if it can.
        why_unable: Returns the reason it cannot compute these arguments of the operator, or None if it can.
        only_if_named: Runs only if ``VISION_KERNELS_BACKEND`` names it, whatever its place in the list.
    """

    backend: str
    forward: Callable
    backward: Callable | None
    summary: str
    devices: tuple[str, ...] = ()
    why_unavailable: Callable[[], str | None] = _always_available
    why_unable: Callable[..., str | None] = _always_able
    only_if_named: bool = False

    def runs_on(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices

    def why_not(self, arguments: tuple) -> str | None:
        """Return why it cannot run here, or not on these arguments if there are any; None if it can."""
        return self.why_unavailable() or (self.why_unable(*arguments) if arguments else None)


def compiled_for_cpu(forward: Callable, backward: Callable | None, why_unable: Callable) -> tuple[Implementation, ...]:
    """Return an implementation for each instruction set; `forward` and `backward` take its name first."""
    return tuple(
        Implementation(
            instruction_set,
            functools.partial(forward, instruction_set),
            backward and functools.partial(backward, instruction_set),
            f"C++ for {processors}",
            devices=("cpu",),
            why_unavailable=functools.partial(native.why_unavailable, instruction_set),
            why_unable=why_unable,
        )
        for instruction_set, processors in native.INSTRUCTION_SETS.items()
    )


@dataclass
class Operator:
    """An operator and its implementations, best first.

    Attributes:
        name: Name under which ``VISION_KERNELS_BACKEND`` finds it.
        implementations: All of them; their order is that of preference.
        composition: Name of the one that calls other operators, which choose for themselves; None if there is none.
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
        """Return the implementation that computes `arguments` of the operator, or most, if none are given.

        Raises:
            ValueError: ``VISION_KERNELS_BACKEND`` names a backend that this operator does not have, or that cannot
                run on this machine, device or arguments.
        """
        chosen = self.forced()
        if chosen is None:
            chosen = self._preferred(device_type, arguments)
        elif reason := _why_not_on(device_type, chosen, arguments):
            if not self._is_left_to_parts():
                raise ValueError(f"{BACKEND_VARIABLE}: {self.name}={chosen.backend}: {reason}")
            chosen = self.named(self.composition)
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
            if self._is_left_to_parts():
                return self.named(self.composition)
            raise ValueError(
                f"{BACKEND_VARIABLE}: {self.name}={backend}: this operator has the backends {', '.join(names)}"
            )
        chosen = self.named(backend)
        if reason := chosen.why_unavailable():
            raise ValueError(f"{BACKEND_VARIABLE}: {self.name}={backend}: {reason}")
        return chosen

    def _is_left_to_parts(self) -> bool:
        """Whether ``VISION_KERNELS_BACKEND`` names one backend for all operators, and others can stand for this one."""
        return self.composition is not None and "=" not in os.environ.get(BACKEND_VARIABLE, "")

    def _available_on(self, device_type: str) -> tuple[Implementation, ...]:
        # Asked in every call; what a machine has does not change.
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
    """Raise a ValueError if ``VISION_KERNELS_BACKEND`` names what cannot run on this machine."""
    for operator in OPERATORS.values():
        operator.forced()


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
