"""Launches of the Triton kernels for SS2D."""

import torch
from torch import Tensor

from vision_kernels.cross_scan.routes import ROUTES
from vision_kernels.selective_scan.triton_scan import launch_chain, power_of_two
from vision_kernels.ss2d.arguments import Ss2dArguments, empty_image
from vision_kernels.ss2d.triton_kernels import ss2d_adjoint, ss2d_backward, ss2d_forward
from vision_kernels.views import contiguous_like

_WARP = 32
_NUMBERS_PER_LANE = 32  # in the tiles of states of one step
# As in selective_scan, time is split into chunks only if there are fewer programs than this.
_ENOUGH_PROGRAMS = 1536
_SHORTEST_CHUNK = 128  # steps
_REGISTERS_AHEAD = 96  # for the projections that are loaded for one block of steps


class _Scan:
    """The inputs, and the division of the work among programs."""

    def __init__(self, given: Ss2dArguments, tiles: int) -> None:
        """Divide the work; `tiles` of states are kept for each of the steps that are loaded together."""
        self.x, projections, *parameters, self.routes, _ = given
        self.projections = projections if projections.stride(3) == 1 else projections.contiguous()
        self.dt_weight, self.dt_bias, self.A, self.D = (each.float().contiguous() for each in parameters)
        self.batch, self.dim, self.height, self.width = self.x.shape
        self.rank, self.states = self.dt_weight.shape[2], self.A.shape[1]
        self.tile = power_of_two(self.states)
        self.block = max(1, min(_WARP, _WARP * _NUMBERS_PER_LANE // (tiles * self.tile)))
        self.blocks = -(-self.dim // self.block)
        fitting = _REGISTERS_AHEAD // (power_of_two(self.rank) + tiles * self.tile)
        self.steps = min(4, max(1, power_of_two(fitting + 1) // 2), power_of_two(max(self.height, self.width)))
        programs, length = self.batch * self.blocks, self.height * self.width
        self.chunks = max(1, min(-(-_ENOUGH_PROGRAMS // programs), length // _SHORTEST_CHUNK))

    def new(self, *shape: int) -> Tensor:
        return self.A.new_empty(shape, dtype=torch.float32)

    def sizes(self) -> tuple[int, ...]:
        return self.height, self.width, self.dim, self.blocks, self.chunks

    def options(self) -> dict[str, int]:
        routes = ROUTES[self.routes]
        return {
            "RANK": self.rank,
            "STATES": self.states,
            "TILE": self.tile,
            "BLOCK": self.block,
            "STEPS": self.steps,
            "COLUMNS": sum(route.by_columns << j for j, route in enumerate(routes)),
            "BACKWARDS": sum(route.backwards << j for j, route in enumerate(routes)),
            "num_warps": 1,
        }

    def parameters(self) -> tuple[Tensor, ...]:
        return self.projections, self.dt_weight, self.dt_bias, self.A

    def forward(
        self,
        route: int,
        routes: int,
        before: Tensor | None,
        y: Tensor | None,
        totals: Tensor | None,
        states: Tensor | None,
    ) -> None:
        """Launch the kernel on `routes` routes, the first of which is `route`."""
        ss2d_forward[(self.batch * self.blocks * self.chunks, routes)](
            self.x,
            *self.parameters(),
            self.D,
            before,
            y,
            totals,
            states,
            route,
            *self.sizes(),
            *self.x.stride(),
            *self.projections.stride(),
            *((0, 0, 0, 0) if y is None else y.stride()),
            **self.options(),
            OUTPUT=y is not None,
            CHAINED=y is not None and states is not None,
        )

    def starts(self) -> tuple[Tensor, Tensor]:
        """Return the state that each chunk starts from, (batch x 4, chunks, tile, dim), and the sums of steps."""
        totals = self.new(self.batch * 4, self.chunks, self.dim)
        states = self.new(self.batch * 4, self.chunks, self.tile, self.dim)
        self.forward(0, 4, None, None, totals, states)
        launch_chain(totals, states, self.A, self.block, backwards=False)
        return states, totals

    def adjoints(self, grad_y: Tensor, totals: Tensor) -> Tensor:
        """Return what the following chunk adds to the gradient of each chunk's last state, in the shape of `starts`."""
        adjoints = self.new(self.batch * 4, self.chunks, self.tile, self.dim)
        ss2d_adjoint[(self.batch * self.blocks * self.chunks, 4)](
            grad_y,
            *self.parameters(),
            adjoints,
            *self.sizes(),
            *grad_y.stride(),
            *self.projections.stride(),
            **self.options(),
        )
        launch_chain(totals, adjoints, self.A, self.block, backwards=True)
        return adjoints


def forward(given: Ss2dArguments) -> Tensor:
    """Return y (batch, dim, height, width) with `out_dtype`."""
    scan, y = _Scan(given, tiles=2), empty_image(given.x, given.out_dtype)
    with torch.cuda.device_of(y):
        sums = y if y.dtype == torch.float32 else empty_image(given.x, torch.float32)
        starts = scan.starts()[0] if scan.chunks > 1 else None
        for route in range(4):
            scan.forward(route, 1, sums if route else None, y if route == 3 else sums, None, starts)
    return y


def backward(grad_y: Tensor, given: Ss2dArguments) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors."""
    grad_x, grad_projections = empty_image(given.x, given.x.dtype), contiguous_like(given.projections)
    with torch.cuda.device_of(grad_x):
        routes = _Backward(_Scan(given, tiles=4), grad_y, grad_x, grad_projections)
        by_route = [routes.along(route) for route in range(4)]
    of_parameters = (torch.stack(each) for each in zip(*by_route, strict=True))
    return grad_x, grad_projections, *(grad.view_as(each) for grad, each in zip(of_parameters, given[2:6], strict=True))


class _Backward:
    """Buffers that the routes use in turn, none larger than x."""

    def __init__(self, scan: _Scan, grad_y: Tensor, grad_x: Tensor, grad_projections: Tensor) -> None:
        self.scan, self.grad_y, self.grad_x, self.grad_projections = scan, grad_y, grad_x, grad_projections
        self.starts: Tensor | None = None
        self.adjoints: Tensor | None = None
        if scan.chunks > 1:
            self.starts, totals = scan.starts()
            self.adjoints = scan.adjoints(grad_y, totals)
        lines = ((scan.height, scan.width), (scan.width, scan.height))
        all_blocks = max(count * -(-length // scan.steps) for count, length in lines)
        self.boundaries = scan.new(scan.batch, all_blocks, scan.tile, scan.dim)
        self.sums = grad_x if grad_x.dtype == torch.float32 else empty_image(grad_x, torch.float32)
        positions = scan.height * scan.width
        self.of_raw = scan.new(scan.batch, positions, scan.dim)
        self.of_couplings = scan.new(scan.blocks, scan.batch, positions, 2, scan.tile)

    def along(self, route: int) -> tuple[Tensor, ...]:
        """Add the gradients of a route to those of the inputs, and return those of its parameters."""
        scan, grad_x = self.scan, self.grad_x if route == 3 else self.sums
        parts = scan.batch, scan.chunks
        of_A = scan.new(*parts, scan.tile, scan.dim)
        of_D, of_bias = (scan.new(*parts, scan.dim) for _ in range(2))
        ss2d_backward[(scan.batch * scan.blocks * scan.chunks,)](
            self.grad_y,
            scan.x,
            *scan.parameters(),
            scan.D,
            self.starts,
            self.adjoints,
            self.boundaries,
            self.sums if route else None,
            grad_x,
            self.of_raw,
            self.of_couplings,
            of_A,
            of_D,
            of_bias,
            route,
            *scan.sizes(),
            *self.grad_y.stride(),
            *scan.x.stride(),
            *scan.projections.stride(),
            *grad_x.stride(),
            **scan.options(),
            CHAINED=scan.chunks > 1,
        )
        low = scan.projections[:, :, route, : scan.rank].float().flatten(0, 1)
        of_raw = self.of_raw.flatten(0, 1)
        target = self.grad_projections[:, :, route]
        target[..., : scan.rank].copy_((of_raw @ scan.dt_weight[route]).unflatten(0, (scan.batch, -1)))
        of_couplings = self.of_couplings[..., : scan.states].sum(0)
        target[..., scan.rank :].copy_(of_couplings.flatten(2))
        of_A = of_A[:, :, : scan.states].sum((0, 1)).t()
        return of_raw.t() @ low, of_bias.sum((0, 1)), of_A, of_D.sum((0, 1))
