"""The global norm of gradients that are partitioned over the feature axis."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.optimizer import gradient_squares
from trainer.parallel.mesh import Axis, Mesh


def global_norm(
    parameters: Mapping[str, nn.Parameter],
    split: Iterable[str],
    mesh: Mesh,
    *,
    sharded: bool = False,
    used_up: Sequence[Tensor] = (),
) -> Tensor:
    """The L2 norm over all ranks, 0-dim float64, the same on all of them.

    split: names of the parameters of which ranks of the feature axis hold parts; the others are counted once. sharded:
    gradients are also sharded over the data axis. used_up: sums of squares of gradients of split parameters that are
    gone already.
    """
    names = set(split)
    parts = [{name: p for name, p in parameters.items() if (name in names) is wanted} for wanted in (True, False)]
    device = next((p.device for p in parameters.values()), None)
    squares = torch.stack(
        [gradient_squares(parts[0], used_up, device=device), gradient_squares(parts[1], device=device)]
    )
    if sharded:
        _sum(squares, mesh.data)
    _sum(squares[:1], mesh.feature)
    return squares.sum().sqrt()


def _sum(x: Tensor, axis: Axis) -> None:
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
