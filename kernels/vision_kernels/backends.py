"""Which implementation of an operator runs, and why.

Every operator owns a list of implementations in order of preference. The first one that is available for the device
of the inputs runs, unless the environment variable ``VISION_KERNELS_BACKEND`` names another. The choice is logged
once for each operator and device; ``python -m vision_kernels`` prints it.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

BACKEND_VARIABLE = "VISION_KERNELS_BACKEND"

_logger = logging.getLogger(__name__)


def _always_available() -> str | None:
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
    """

    backend: str
    forward: Callable
    backward: Callable
    summary: str
    devices: tuple[str, ...] = ()
    why_unavailable: Callable[[], str | None] = _always_available

    def runs_on(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices


@dataclass
class Operator:
    """An operator and its implementations, best first."""

    name: str
    implementations: tuple[Implementation, ...]
    _announced: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self

    def select(self, device_type: str) -> Implementation:
        """Return the implementation that runs on `device_type`.

        Raises:
            ValueError: ``VISION_KERNELS_BACKEND`` names a backend that this operator does not have, or that cannot
                run on this machine or device.
        """
        forced = os.environ.get(BACKEND_VARIABLE, "")
        chosen = self._forced(forced, device_type) if forced else self._preferred(device_type)
        if (chosen.backend, device_type) not in self._announced:
            self._announced.add((chosen.backend, device_type))
            _logger.info("%s on %s: backend %r", self.name, device_type, chosen.backend)
        return chosen

    def _preferred(self, device_type: str) -> Implementation:
        for implementation in self.implementations:
            if implementation.runs_on(device_type) and implementation.why_unavailable() is None:
                return implementation
        raise ValueError(f"{self.name}: no implementation runs on device {device_type!r}")

    def _forced(self, backend: str, device_type: str) -> Implementation:
        implementation = self.named(backend)
        if not implementation.runs_on(device_type):
            devices = ", ".join(implementation.devices)
            raise ValueError(f"{BACKEND_VARIABLE}={backend}: runs on {devices}, the inputs are on {device_type}")
        return implementation

    def named(self, backend: str) -> Implementation:
        """Return the implementation of a backend.

        Raises:
            ValueError: There is none, or it cannot run on this machine.
        """
        by_name = {implementation.backend: implementation for implementation in self.implementations}
        if backend not in by_name:
            raise ValueError(f"{BACKEND_VARIABLE}={backend}: {self.name} has the backends {', '.join(by_name)}")
        reason = by_name[backend].why_unavailable()
        if reason is not None:
            raise ValueError(f"{BACKEND_VARIABLE}={backend}: {self.name}: {reason}")
        return by_name[backend]


OPERATORS: dict[str, Operator] = {}


def check_forced_backend() -> None:
    """Raise a ValueError if ``VISION_KERNELS_BACKEND`` names a backend with which no operator can run here."""
    forced = os.environ.get(BACKEND_VARIABLE, "")
    problems = []
    for operator in OPERATORS.values() if forced else ():
        try:
            operator.named(forced)
            return
        except ValueError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def overview() -> str:
    """Return a table of every operator's implementations and which of them is active on which device."""
    device_types = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"torch {torch.__version__}, devices: {', '.join(device_types)}"]
    for operator in OPERATORS.values():
        active = {device: operator.select(device).backend for device in device_types}
        lines.append(f"\n{operator.name}")
        for implementation in operator.implementations:
            on = [device for device, backend in active.items() if backend == implementation.backend]
            status = f"active on {', '.join(on)}" if on else implementation.why_unavailable() or "available"
            lines.append(f"  {implementation.backend:<10} {implementation.summary:<55} {status}")
    lines.append(f"\nSet {BACKEND_VARIABLE} to one of these names to force it.")
    return "\n".join(lines)
