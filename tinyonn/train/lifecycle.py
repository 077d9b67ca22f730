"""The life of experts: those that nobody uses are recycled, inactive ones are woken for tokens that no expert serves.

    rate      regeneration_rate(PI, floor=FLOOR, ceiling=CEILING)      PI: smoothed predictive integrity
    credit    recycling: += rate · (experts below pruning_threshold)    each window; whole units are spent, one expert each
              birth:     += rate                                       each window in which tokens stay unserved

Both happen at the end of a window of steps, in each layer, by numbers that are the same on all processes, so that all of them decide alike.
Pools of experts are allocated beforehand and changed in place, so compiled graphs stay valid.

F features, E experts
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from .._debug import debug_enabled
from ..nn.expert_life import ExpertLife
from ..nn.expert_pools import parameters_of_experts
from ..nn.expert_rows import set_row, whole
from ..nn.routed import Routed
from ..nn.surprise_capture import CapturedCall, call_listener
from ..nn.surprise_loss import SurpriseLoss, surprise_loss_of
from ..ops._checks import check_flag, check_number, check_size
from .captured_surprise import CapturedSurprise
from .integrity import regeneration_rate
from .mixtures import Mixtures, mixtures_of

if TYPE_CHECKING:
    from torch.amp import GradScaler

WINDOW = 100  # steps over which rates are measured, and after which experts are recycled and born
STAYS = 2  # windows in a row in which too many tokens are unserved, before a birth
SMOOTHING = 0.98  # of the running mean of PI; it starts as the plain mean of the first steps
FLOOR, CEILING = 1 / 16, 1.0  # of the regeneration rate, at a PI of 1 and of 0


class LifeEvent(NamedTuple):
    """A birth or a recycling.

    Attributes:
        step: step of the lifecycle, from 1.
        layer: name of the layer in the model.
        kind: "birth": an inactive expert was woken; "recycling": a live one was reset.
        expert: its index.
        share: of the window's tokens, for a birth those that no expert served, for a recycling those that went to the expert.
        age: steps that the recycled expert had lived; 0 for a birth.
        from_tokens: whether the prototype points to the unserved tokens; it is random otherwise.
    """

    step: int
    layer: str
    kind: Literal["birth", "recycling"]
    expert: int
    share: float
    age: int
    from_tokens: bool


class _Window(NamedTuple):
    """What a layer decides by, on the host. counts (E,), tokens, unserved and over are numbers, total (F,), birth_step, live (E,)."""

    counts: Tensor
    tokens: float
    unserved: float
    total: Tensor
    birth_step: Tensor
    live: Tensor
    credit: list[float]
    over: int

    def share(self, expert: int) -> float:
        return float(self.counts[expert]) / self.tokens

    def age(self, expert: int, step: int) -> int:
        return step - int(self.birth_step[expert])


class ExpertLifecycle:
    """Records the life of the experts of all `nn.DynMoE` and `nn.DynSMHA` layers of a model, recycles experts and wakes new ones.

        lifecycle = ExpertLifecycle(model, optimizer, pruning_threshold=0.001, growth_threshold=0.05)
        for batch in batches:
            with lifecycle.recording() as surprise:      # only if the surprise of experts is to be summed
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for event in lifecycle.step(integrity):      # PI of this step
                print(event)

    Each layer gets a submodule `life`, an `nn.expert_life.ExpertLife`, whose buffers are saved with the model. Forwards in training mode
    count their tokens once each, without those outside a `token_mask`. Every 100 steps (`WINDOW`) each layer decides:

    - **Recycling.** A live expert to which less than a share `pruning_threshold` of the tokens went, and which lived through the whole
      window, is reset in place.
    - **Birth.** A token is unserved if it passes no threshold, so that it has only the experts of `min_experts`. If their share was above
      `growth_threshold` in two windows in a row (`STAYS`), one inactive expert is woken.

    A new expert has fresh weights, the mean threshold of the live experts, and a prototype as long as theirs on average. The first one of a
    layer and window points to the mean of the unserved tokens, x / rms(x); others, and those of a layer without unserved tokens, point in a
    random direction. The optimisers' state of its rows is set to 0.

    PI drives both: a window adds its `regeneration_rate` to a credit for a birth, and this times the number of experts to recycle to
    another one. Whole units of credit are spent, on the least used experts first. The rate is 1 at a PI of 0, where everything above
    happens at once, and 1/16 at a PI of 1. Without a PI in any step it is 1.

    Under DistributedDataParallel and `fully_shard` pass the wrapped model, and call `step` on all processes: it adds up what they counted
    in one all-reduce. Only the end of a window waits for the device. For training that goes on later, save the state dicts of the model, of
    the optimisers and of this object after the same step; it then makes the same decisions.

    Args:
        model: a model with at least one such layer; the wrapper, if it has one.
        optimizer: the optimiser of the layers' parameters, or several.
        pruning_threshold: share of the tokens below which an expert is recycled, 0 … 1; None for no recycling.
        growth_threshold: share of unserved tokens above which an expert is born, 0 … 1; None for no birth.
        w_ce, w_kl: whether PI drives this weight of the `SurpriseLoss` that `surprise_loss` returns.
        seed: seed of new weights and of random prototypes, at least 0.

    Attributes:
        steps: number of steps so far.
        rate: regeneration rate at the last end of a window.

    Raises:
        TypeError: the model has no such layer, or a wrapper that `HyperStep` refuses; an option has the wrong type.
        ValueError: an option is out of range; a parameter that a new expert needs is frozen or not in exactly one optimiser;
            growth_threshold is given, but no layer has an inactive expert, or one routes by budget.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        pruning_threshold: float | None = None,
        growth_threshold: float | None = None,
        w_ce: bool = False,
        w_kl: bool = False,
        seed: int = 0,
    ) -> None:
        for name, threshold in (("pruning_threshold", pruning_threshold), ("growth_threshold", growth_threshold)):
            if threshold is not None:
                check_number(name, threshold, at_least=0, at_most=1)
        for name, flag in (("w_ce", w_ce), ("w_kl", w_kl)):
            check_flag(name, flag)
        check_size("seed", seed, 0)
        self.pruning_threshold, self.growth_threshold = pruning_threshold, growth_threshold
        self.w_ce, self.w_kl, self.seed = w_ce, w_kl, seed
        self.optimizers = _optimizers(optimizer)
        self.model = model
        self._mixtures = Mixtures(model)
        if growth_threshold is not None:
            _check_growth(self._mixtures.layers, growth_threshold)
        if pruning_threshold is not None or growth_threshold is not None:
            _check_trained(self._mixtures.layers, self.optimizers)
        self.steps, self.rate = 0, CEILING
        self._smoothed, self._known = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for layer in self._mixtures.layers.values():
            _begin(layer, 0)

    @property
    def integrity(self) -> float | None:
        """The smoothed PI; None before the first. Waits for the device."""
        return float(self._smoothed) if float(self._known) else None

    @contextmanager
    def recording(self, scaler: GradScaler | None = None) -> Iterator[CapturedSurprise]:
        """Sums the surprise of the forwards and backwards within the block, for each expert, at its end.

        Args:
            scaler: AMP's scaler, if it scales the loss within the block; the sums are divided by its scale at the beginning.

        Yields:
            The surprise of these layers by name, complete after backward, as `capture_surprise` gives it, and not divided.

        Raises:
            RuntimeError: `capture_surprise` or another recording is active.
        """
        lives = self._lives()
        names = {layer: name for name, layer in self._mixtures.layers.items()}
        scale = 1.0 if scaler is None else scaler.get_scale()
        calls: dict[str, list[CapturedCall]] = {name: [] for name in names.values()}
        counted: list[tuple[ExpertLife, CapturedCall]] = []

        def keep(layer: Any, call: CapturedCall) -> None:
            calls[names[layer]].append(call)
            if layer.training:
                counted.append((lives[layer], call))

        with call_listener(lives, "surprise", keep):
            yield CapturedSurprise(calls)
        with torch.no_grad():
            for life, call in counted:
                life.add_surprise(call, scale)

    @torch.no_grad()
    def step(self, integrity: Tensor | float | None = None) -> list[LifeEvent]:
        """Ends a step, after that of the optimisers: adds up what all processes counted, and at the end of a window recycles and wakes.

        Args:
            integrity: predictive integrity of the step's tokens on this process, 0 … 1, a number or 0-d, as by `predictive_integrity` with
                over="batch"; processes average theirs. None or NaN if this process has none, as without a token.

        Returns:
            What happened, the same on all processes; empty unless a window ends.

        Raises:
            TypeError, ValueError: integrity is no number, no 0-d tensor or out of range; that of a tensor is checked under
                `tinyonn.debug()` only.
        """
        _check_integrity(integrity)
        layers = self._lives()
        self.steps += 1
        self._merge(layers, integrity)
        return self._turn(layers) if self.steps % WINDOW == 0 else []

    def surprise_loss(self, surprise_loss: SurpriseLoss | Mapping[str, Any] | None = None) -> SurpriseLoss:
        """A `SurpriseLoss` whose weights `w_ce` and `w_kl` are multiplied by the last window's `rate`, if this object's options of these
        names are True: routers learn less from surprise where the model predicts well.

            step.surprise_loss = lifecycle.surprise_loss({"w_kl": 0.5})

        Args:
            surprise_loss: the weights before that; None for the defaults.
        """
        given = surprise_loss_of(surprise_loss)
        driven = {name: getattr(given, name) * self.rate for name in ("w_ce", "w_kl") if getattr(self, name)}
        return replace(given, **driven)

    def state_dict(self) -> dict[str, Any]:
        """What the model's state dict does not hold: steps, smoothed PI, rate and seed."""
        return {
            "steps": self.steps, "rate": self.rate, "seed": self.seed, "integrity": float(self._smoothed), "known": int(self._known),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues the run that this state was saved in. Load the model's state dict too.

        Raises:
            ValueError: the state has other keys, or is of a run with another seed.
        """
        keys = self.state_dict().keys()
        if state_dict.keys() != keys:
            raise ValueError(f"state_dict must have the keys {', '.join(keys)}, got {', '.join(map(str, state_dict)) or 'none'}.")
        if state_dict["seed"] != self.seed:
            raise ValueError(f"seed must be {state_dict['seed']} as in the saved run, got {self.seed}.")
        self.steps, self.rate = state_dict["steps"], state_dict["rate"]
        self._smoothed.fill_(state_dict["integrity"])
        self._known.fill_(state_dict["known"])

    def _lives(self) -> dict[Routed, ExpertLife]:
        """The layers, searched again if modules were replaced."""
        _reshard(self.model)
        self._mixtures = mixtures_of(self.model, self._mixtures)
        return {layer: layer.track_life() for layer in self._mixtures.layers.values()}

    def _merge(self, layers: Mapping[Routed, ExpertLife], integrity: Tensor | float | None) -> None:
        lives = list(layers.values())
        device = lives[0].window.device
        value = _on(device, integrity)
        given = torch.stack([value.nan_to_num(0.0), (~value.isnan()).double()])
        flat = torch.cat([given, *(life.pending.to(device) for life in lives)])
        if self._mixtures.sharded:
            prototypes: Any = next(iter(layers)).router.prototypes
            distributed.all_reduce(flat, group=prototypes.device_mesh.get_group())
        elif self._mixtures.wrapper is not None:
            distributed.all_reduce(flat, group=self._mixtures.wrapper.process_group)
        (total, number), *parts = flat.split([2, *(len(life.pending) for life in lives)])
        for (layer, life), part in zip(layers.items(), parts, strict=True):
            life.merge(part.to(life.window.device), layer.router.expert_mask, self.steps)
            life.pending.zero_()
        self._smoothed, self._known = self._smoothed.to(device), self._known.to(device)
        some = number > 0
        weight = (1 / (self._known + 1)).clamp(min=1 - SMOOTHING)
        self._smoothed = torch.where(some, torch.lerp(self._smoothed, total / number.clamp(min=1), weight), self._smoothed)
        self._known = self._known + some

    def _turn(self, layers: Mapping[Routed, ExpertLife]) -> list[LifeEvent]:
        """Ends a window: one transfer to the host for all layers, then the decisions of each."""
        device = self._smoothed.device
        parts = [torch.stack([self._smoothed, self._known])]
        for layer, life in layers.items():
            found = (life.window, life.birth_step, layer.router.expert_mask, life.credit, life.over.unsqueeze(0))
            parts.append(torch.cat([part.to(device, torch.float64) for part in found]))
        (smoothed, known), *rows = torch.cat(parts).cpu().split([len(part) for part in parts])
        integrity = min(max(float(smoothed), 0.0), 1.0) if known else 0.0  # rounding may pass the ends
        self.rate = float(regeneration_rate(integrity, floor=FLOOR, ceiling=CEILING))
        events = []
        for place, (name, row) in enumerate(zip(self._mixtures.layers, rows, strict=True)):
            layer = self._mixtures.layers[name]
            events += self._turn_of(name, place, layer, layers[layer], _unpacked(row, layers[layer].num_experts))
        return events

    def _turn_of(self, name: str, place: int, layer: Routed, life: ExpertLife, window: _Window) -> list[LifeEvent]:
        """Ends a window of one layer: recycles and wakes what it decides, and begins the next window."""
        events: list[LifeEvent] = []
        if not window.tokens:
            return events
        born, birth_credit, over = self._births(window)
        recycled, recycling_credit = self._recyclings(window)
        if born or recycled:
            others = window.live.clone()
            others[recycled] = False
            length, threshold = _typical(layer, others if bool(others.any()) else window.live)
            served = layer.routing_kind == "budget" or not window.total.any()
            for number, expert in enumerate(born + recycled):
                direction = None if number or served else window.total
                self._begin_expert(layer, place, expert, direction, length, threshold)
                life.begin(expert, self.steps)
                what = (window.unserved / window.tokens, 0) if expert in born else (window.share(expert), window.age(expert, self.steps))
                kind: Literal["birth", "recycling"] = "birth" if expert in born else "recycling"
                events.append(LifeEvent(self.steps, name, kind, expert, *what, direction is not None))
        life.window.zero_()
        life.over.fill_(over)
        life.credit.copy_(torch.tensor([birth_credit, recycling_credit], dtype=torch.float64))
        return events

    def _births(self, window: _Window) -> tuple[list[int], float, int]:
        """The inactive expert to wake, if any; what is left of the credit; windows in a row with too many unserved tokens."""
        credit = window.credit[0]
        if self.growth_threshold is None or window.unserved / window.tokens <= self.growth_threshold:
            return [], credit, 0
        over = window.over + 1
        if over < STAYS or bool(window.live.all()):
            return [], credit, over
        credit += self.rate
        return ([int((~window.live).nonzero()[0])], credit - 1, over) if credit >= 1 else ([], credit, over)

    def _recyclings(self, window: _Window) -> tuple[list[int], float]:
        """The live experts to recycle, the least used first, and what is left of the credit."""
        credit = window.credit[1]
        if self.pruning_threshold is None:
            return [], credit
        rare = window.live & (window.counts / window.tokens < self.pruning_threshold) & (window.birth_step <= self.steps - WINDOW)
        unused = sorted(rare.nonzero().flatten().tolist(), key=lambda expert: (window.share(expert), expert))
        credit += self.rate * len(unused)
        spent = min(int(credit), len(unused))
        return unused[:spent], credit - spent

    def _begin_expert(self, layer: Routed, place: int, expert: int, direction: Tensor | None, length: Tensor, threshold: Tensor) -> None:
        """New weights, prototype and threshold; the same on all processes, as they are drawn on the CPU."""
        for name, fresh in layer.fresh_experts(1, self._seed("weights", place, expert)).items():
            set_row(layer.expert_parameters()[name], expert, fresh[0])
        if direction is None:
            generator = torch.Generator().manual_seed(self._seed("prototype", place, expert))
            direction = torch.randn(layer.router.prototypes.shape[1], generator=generator, dtype=torch.float64)
        unit = direction / direction.norm()
        layer.router.place_expert(expert, unit.to(length.device) * length, threshold)
        for parameter in parameters_of_experts(layer).values():
            _forget(self.optimizers, parameter, expert)

    def _seed(self, what: str, place: int, expert: int) -> int:
        text = repr((self.seed, self.steps, place, expert, what))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _reshard(model: nn.Module) -> None:
    """Splits parameters over processes again: a forward without a backward, as in evaluation, may leave them gathered."""
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _begin(layer: Routed, step: int) -> None:
    life = layer.track_life()
    life.merge(torch.zeros_like(life.pending), layer.router.expert_mask, step)


def _unpacked(row: Tensor, experts: int) -> _Window:
    features = len(row) - 3 * experts - 5
    counts, numbers, total, birth_step, live, credit, over = row.split([experts, 2, features, experts, experts, 2, 1])
    return _Window(counts, float(numbers[0]), float(numbers[1]), total, birth_step.long(), live > 0, credit.tolist(), int(over))


def _typical(layer: Routed, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean length of these experts' prototypes, float64, and their mean threshold; 0-d. `experts` is (E,) bool."""
    prototypes, thresholds = whole(layer.router.prototypes).double(), whole(layer.router.thresholds)
    kept = experts.to(prototypes.device)
    return prototypes[kept].norm(dim=-1).mean(), thresholds[kept].mean()


def _forget(optimizers: list[Optimizer], parameter: nn.Parameter, expert: int) -> None:
    """Zeros of this row in the optimisers' state. Numbers that belong to the whole parameter, such as Adam's step, stay."""
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() != parameter.dim() or len(value) != len(parameter):
                continue
            if not value.is_floating_point():
                raise TypeError(f"optimizer must keep its state as floats, got {value.dtype} for {key}, of which no row can be set to 0.")
            set_row(value, expert, 0.0)


def _optimizers(optimizer: Any) -> list[Optimizer]:
    found = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for one in found:
        if not hasattr(one, "param_groups") or not hasattr(one, "state"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(one).__name__}.")
    return found


def _check_growth(layers: Mapping[str, Routed], growth_threshold: float) -> None:
    for name, layer in layers.items():
        if layer.routing_kind == "budget":
            raise ValueError(
                f"growth_threshold must be None with routing='budget', which serves every token, got {growth_threshold:g} and {name!r}."
            )
    if not any(layer.router.num_live < len(layer.expert_counts) or not bool(layer.router.expert_mask.all()) for layer in layers.values()):
        raise ValueError(
            f"growth_threshold must be None unless a layer has an inactive expert, got {growth_threshold:g} with all experts live; make "
            "the layers with max_num_experts above num_experts."
        )


def _check_trained(layers: Mapping[str, Routed], optimizers: list[Optimizer]) -> None:
    """ValueError if a new expert could not learn."""
    held = [id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]]
    for name, layer in layers.items():
        for inner, parameter in parameters_of_experts(layer).items():
            title = f"{name}.{inner}".lstrip(".")
            if inner == "router.thresholds" and not parameter.requires_grad:
                continue  # the mean of the live experts' will do
            if not parameter.requires_grad:
                raise ValueError(f"{title} must require a gradient, because new experts start from random weights.")
            if held.count(id(parameter)) != 1:
                raise ValueError(f"{title} must be in one optimiser, got {held.count(id(parameter))}.")


def _check_integrity(integrity: Any) -> None:
    if integrity is None or (isinstance(integrity, float) and math.isnan(integrity)):
        return
    if not isinstance(integrity, Tensor):
        check_number("integrity", integrity, at_least=0, at_most=1)
    elif integrity.dim() or not integrity.is_floating_point():
        raise TypeError(f"integrity must be a number or a 0-d tensor of floats, got {integrity.dtype} of shape {tuple(integrity.shape)}.")
    elif debug_enabled() and not bool(integrity.isnan() | ((integrity >= 0) & (integrity <= 1))):
        raise ValueError(f"integrity must be at least 0 and at most 1, got {integrity.item()}.")


def _on(device: torch.device, integrity: Tensor | float | None) -> Tensor:
    """0-d float64, NaN for None, without waiting for the device."""
    if isinstance(integrity, Tensor):
        return integrity.detach().to(device, torch.float64, non_blocking=True)
    return torch.full((), math.nan if integrity is None else integrity, dtype=torch.float64, device=device)
