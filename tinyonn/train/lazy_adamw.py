"""AdamW that leaves an expert as it is in a step in which it has no gradient.

    row r of a pool is active if grad[r] has a value other than 0
    active row: AdamW's update; t of its bias correction 1 − β^t counts the steps of the whole parameter
    idle row: weight, exp_avg, exp_avg_sq and max_exp_avg_sq keep their bits; no momentum and no weight decay

A pool is a parameter with one row for each expert. Wide rows are updated in place, a run of neighbouring active rows at a time, without
memory for copies. Narrow rows are copied out, updated and copied back, because many calls on short runs would take longer than the copies.

R rows of a pool
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.optim import AdamW
from torch.optim.adamw import adamw

from ..nn.expert_rows import own_part

WIDE = 16_384  # values of a row that is updated in place; on two cores, a call on a run costs what copies of 8,000 values do
GLANCE = 64  # values at the beginning of a row, which nearly always show that it is active

# As `AdamW._init_group` fills them: parameters, gradients, exp_avg, exp_avg_sq, max_exp_avg_sq (empty without amsgrad), steps.
Columns = list[list[Tensor]]
GRADS, STEPS = 1, 5


class LazyAdamW(AdamW):
    """`torch.optim.AdamW` that does not move experts without a gradient.

        optimizer = LazyAdamW(model.parameters(), lr=1e-3, pools=expert_pools(model))

    AdamW's momentum and weight decay move every row of a parameter, also those of experts that saw no token. Here a row of a pool changes
    only in a step in which its gradient has a value other than 0, NaN included; until then its weight and its state keep their bits. Other
    parameters, and pools of which every row is active, are updated as by AdamW, to the same bits.

    The count of steps belongs to the whole parameter, as in AdamW: the bias correction of a row that was idle counts those steps too. So
    the state dict is AdamW's, and each loads that of the other. An expert that comes back goes on with the momentum of its last step.

    A pool is known by its place in the parameter groups, as in a state dict, so it stays one if the parameter there is replaced, as
    Accelerate does when it shards a model. Groups that are added later have no pools. Works under DistributedDataParallel and
    `fully_shard`; where pools are sharded by columns, a step has one all-reduce. On a GPU a step waits once for the device, to learn which
    rows are active, so it can't be captured in a CUDA graph. `GradScaler` works, also with `fused=True`.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, fused: see `torch.optim.AdamW`.
        pools: parameters among `params`, (R, ...), whose rows are experts; None for none.
        capturable, differentiable: must be False.

    Raises:
        TypeError: pools is not an iterable of tensors.
        ValueError: a pool is not among params, or is 0-d; capturable or differentiable is True, also in a loaded state.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        pools: Iterable[Tensor] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._places = _places(self.param_groups, pools)

    @property
    def pools(self) -> list[Tensor]:
        """The pools, in the order of the parameter groups."""
        return [self.param_groups[group]["params"][place] for group, place in self._places]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of `load_state_dict` too, without the places
        for group in state["param_groups"]:
            _check_group(group)
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have a gradient, as AdamW does; `closure` evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pools = {id(pool) for pool in self.pools}
        begun: list[tuple[Columns, bool, list[int]]] = []
        for group in self.param_groups:
            columns: Columns = [[] for _ in range(STEPS + 1)]
            has_complex = self._init_group(group, *columns)
            begun.append((columns, has_complex, [place for place, parameter in enumerate(columns[0]) if id(parameter) in pools]))
        active = iter(_active_rows([columns[GRADS][place] for columns, _, places in begun for place in places]))
        for group, (columns, has_complex, places) in zip(self.param_groups, begun, strict=True):
            rows = {place: next(active) for place in places}
            lazy = {place: found for place, found in rows.items() if not all(found.on_host)}
            self._update(group, [[x for place, x in enumerate(column) if place not in lazy] for column in columns], has_complex)
            if lazy:
                self._update_rows(group, columns, has_complex, lazy)
        return loss

    def _update(self, group: dict[str, Any], columns: Columns, has_complex: bool) -> None:
        """AdamW's own update of tensors, as its `step` calls it."""
        parameters, grads, exp_avgs, exp_avg_sqs, maxima, steps = columns
        beta1, beta2 = group["betas"]
        adamw(
            parameters, grads, exp_avgs, exp_avg_sqs, maxima, steps, foreach=group["foreach"], fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),  # set by GradScaler for fused=True
            has_complex=has_complex, amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip

    def _update_rows(self, group: dict[str, Any], columns: Columns, has_complex: bool, lazy: dict[int, _Rows]) -> None:
        """Updates the active rows of pools. `lazy` has them by place in the columns."""
        parts: Columns = [[] for _ in columns]
        copied: list[tuple[Tensor, Tensor, Tensor]] = []  # tensor, rows, their new values
        for place, rows in lazy.items():
            if not any(rows.on_host):
                continue
            tensors = {number: own_part(column[place]) for number, column in enumerate(columns[:STEPS]) if column}
            if tensors[0].numel() >= WIDE * len(tensors[0]) and all(x.is_contiguous() for x in tensors.values()):
                runs = list(_runs(rows.on_host))
                cut = {number: [x.narrow(0, *run) for run in runs] for number, x in tensors.items()}
            else:
                index = torch.nonzero_static(rows.on_device, size=sum(rows.on_host)).squeeze(1)
                cut = {number: [x.index_select(0, index)] for number, x in tensors.items()}
                copied += [(x, index, cut[number][0]) for number, x in tensors.items() if number != GRADS or self._unscales()]
            for number, found in cut.items():
                parts[number] += found
            parts[STEPS] += columns[STEPS][place].repeat(len(cut[0])).unbind()
        if parts[0]:
            self._update(group, parts, has_complex)
        for tensor, index, values in copied:
            tensor.index_copy_(0, index, values)
        found_inf = getattr(self, "found_inf", None)
        for place in lazy:
            step = columns[STEPS][place]
            step += 1 if found_inf is None else 1 - found_inf.to(step.device, non_blocking=True)

    def _unscales(self) -> bool:
        """Whether the update also divides gradients by GradScaler's scale."""
        return getattr(self, "grad_scale", None) is not None


class _Rows(NamedTuple):
    """Which rows of a pool are active, (R,), on the host and as bool on the pool's device."""

    on_host: list[bool]
    on_device: Tensor


def _active_rows(grads: list[Tensor]) -> list[_Rows]:
    """Rows with a value other than 0, of this process's part if a gradient is sharded. Waits for the device once."""
    if not grads:
        return []
    masks = [_nonzero_rows(own_part(grad)) for grad in grads]
    by_columns: dict[Any, list[int]] = defaultdict(list)
    for number, grad in enumerate(grads):
        for dim, placement in enumerate(getattr(grad, "placements", ())):
            if getattr(placement, "dim", 0) % grad.dim():
                by_columns[grad.device_mesh.get_group(dim)].append(number)  # type: ignore[attr-defined]
    for process_group, numbers in by_columns.items():
        joined = torch.cat([masks[number] for number in numbers]).to(torch.uint8)
        distributed.all_reduce(joined, distributed.ReduceOp.MAX, group=process_group)
        for number, part in zip(numbers, joined.split([len(masks[number]) for number in numbers]), strict=True):
            masks[number] = part.bool()
    on_host = torch.cat([mask.to(masks[0].device, non_blocking=True) for mask in masks]).tolist()
    ends = iter(on_host)
    return [_Rows([next(ends) for _ in range(len(mask))], mask) for mask in masks]


def _nonzero_rows(grad: Tensor) -> Tensor:
    """(R,) bool: rows with a value other than 0, NaN included."""
    rows = grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)
    if not rows.is_cpu or rows.is_complex():
        return rows.any(1)
    begin = rows[:, :GLANCE].any(1)
    if rows.shape[1] <= GLANCE or bool(begin.all()):
        return begin
    return (rows.amax(1) != 0) | (rows.amin(1) != 0)  # on a CPU several times as fast as `any`


def _runs(active: list[bool]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each run of active ones."""
    start = 0
    for kind, run in groupby(active):
        number = len(list(run))
        if kind:
            yield start, number
        start += number


def _places(groups: list[dict[str, Any]], pools: Any) -> list[tuple[int, int]]:
    """Group of each pool and place in it, sorted. Raises as `LazyAdamW` does."""
    if isinstance(pools, Tensor):
        raise TypeError("pools must be an iterable of tensors, got a tensor.")
    places = {id(parameter): (number, place) for number, group in enumerate(groups) for place, parameter in enumerate(group["params"])}
    found = set()
    for pool in () if pools is None else pools:
        if not isinstance(pool, Tensor):
            raise TypeError(f"pools must be an iterable of tensors, got one with {type(pool).__name__}.")
        if id(pool) not in places:
            raise ValueError(f"pools must be among params, got a tensor of shape {tuple(pool.shape)} that is not.")
        if not pool.dim():
            raise ValueError("pools must have a row for each expert, got a 0-d tensor.")
        found.add(places[id(pool)])
    return sorted(found)


def _check_group(group: dict[str, Any]) -> None:
    for name, reason in (("capturable", "a step waits for the device"), ("differentiable", "a step has no graph")):
        if group.get(name):
            raise ValueError(f"{name} must be False for LazyAdamW, because {reason}, got True.")
