"""The life of experts: what is counted, who is recycled and born, and what PI, the optimiser and files have to do with it.

Routers are constructed: expert e has the unit vector e as its prototype and a threshold of 1. A token along axis a has the score √F there,
so it goes to expert a alone; a token along an axis without an expert is unserved, and goes to expert 0.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tinyonn
from tinyonn.nn import DynMoE, token_mask_of
from tinyonn.nn.routed import Routed
from tinyonn.train import ExpertLifecycle, HyperStep, LifeEvent, SurpriseLoss, capture_surprise, lifecycle, regeneration_rate

F, E = 8, 5


@pytest.fixture
def window(monkeypatch) -> int:
    monkeypatch.setattr(lifecycle, "WINDOW", 3)
    return 3


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def axes(*numbers: int) -> Tensor:
    """A token along each of these axes, of different lengths."""
    lengths = torch.arange(1, len(numbers) + 1).unsqueeze(-1) / len(numbers)
    return nn.functional.one_hot(torch.tensor(numbers), F).float() * lengths


def mixture(live: int = 3, **options) -> DynMoE:
    torch.manual_seed(0)
    given = {"thresholds": "learned", "form": "linear", "gating_loss": "none", "target_k": 1, "max_experts": E, **options}
    module = DynMoE(F, 4, live, max_num_experts=E, **given)
    with torch.no_grad():
        module.router.prototypes.copy_(torch.eye(E, F))
        module.router.thresholds.fill_(1)
    return module


def still(module: nn.Module) -> torch.optim.Optimizer:
    """Changes nothing."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def living(module: nn.Module, **options) -> ExpertLifecycle:
    return ExpertLifecycle(module, still(module), **options)


def run(life: ExpertLifecycle, x: Tensor, steps: int, integrity: float | None = None) -> list[LifeEvent]:
    events = []
    for _ in range(steps):
        life.model(x)
        events += life.step(integrity)
    return events


# ---- what is counted


def by_hand(module: DynMoE, x: Tensor, mask: np.ndarray, grad: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of each expert, sum of w · ‖∂L/∂out‖ · ‖h‖, and which tokens are unserved; in float64."""
    wide = x.double().numpy()
    scores = wide / np.sqrt((wide**2).mean(1, keepdims=True)) @ module.router.prototypes.detach().double().numpy().T
    scores = scores - module.router.thresholds.detach().double().numpy()
    scores[:, ~module.router.expert_mask.numpy()] = -np.inf
    chosen = scores > 0
    unserved = mask & ~chosen.any(1)
    chosen[np.arange(len(x)), scores.argmax(1)] = True
    weights = np.where(chosen, np.exp(scores), 0)
    weights /= weights.sum(1, keepdims=True)
    gate, up = np.split(np.einsum("nf,eif->nei", wide, module.gate_up_proj.detach().double().numpy()), 2, axis=-1)
    hidden = np.linalg.norm(gate / (1 + np.exp(-gate)) * up, axis=-1)
    surprise = np.where(chosen, weights * np.linalg.norm(grad.double().numpy(), axis=1)[:, None] * hidden, 0)
    return chosen[mask].sum(0), surprise[mask].sum(0), unserved


@pytest.mark.parametrize("mode", ["eager", "option", "reentrant", "non-reentrant", "compiled"])
def test_activations_and_surprise_are_sums_over_the_tokens_of_a_life(mode):
    module = mixture(4, checkpoint=mode == "option")
    with torch.no_grad():
        module.router.prototypes.add_(0.3 * tokens(E, F, seed=5))
    life = living(module)
    layer = torch.compile(module, backend="aot_eager", fullgraph=True) if mode == "compiled" else module
    counts, surprise, unserved, direction = np.zeros(E), np.zeros(E), 0, np.zeros(F)
    for step in range(3):
        with life.recording():
            for part in range(2):  # accumulated
                seed = 2 * step + part
                x, grad = tokens(20, F, seed=seed), tokens(20, F, seed=seed + 50)
                mask = np.arange(20) < (20, 13)[part]
                with token_mask_of(module, torch.from_numpy(mask)):
                    given = x.clone().requires_grad_()
                    out = checkpoint(layer, given, use_reentrant=mode == "reentrant") if "reentrant" in mode else layer(given)
                    (out * grad / 2).sum().backward()
                found = by_hand(module, x, mask, grad / 2)
                counts, surprise = counts + found[0], surprise + found[1]
                unserved += found[2].sum()
                direction += (x / x.square().mean(-1, keepdim=True).sqrt()).double().numpy()[found[2]].sum(0)
        assert life.step() == []
    own = module.life
    assert own.activations.tolist() == counts.tolist()
    np.testing.assert_allclose(own.surprise, surprise, rtol=1e-4)
    assert unserved > 0
    assert own.window[: E + 2].tolist() == [*counts, 3 * 33, unserved]
    np.testing.assert_allclose(own.window[E + 2 :], direction, rtol=1e-4, atol=1e-5)
    assert own.birth_step.tolist() == [0, 0, 0, 0, -1]
    assert own.lives.tolist() == [1, 1, 1, 1, 0]


def test_evaluation_and_tokens_with_nan_do_not_count_and_surprise_is_summed_only_if_recorded():
    module = mixture()
    life = living(module)
    x = axes(0, 1, 1)
    module.eval()(x)
    with torch.no_grad():
        x[0] = torch.nan
    module.train()(x).nansum().backward()
    life.step()
    assert module.life.activations.tolist() == [0, 2, 0, 0, 0]
    assert not module.life.surprise.any()


def test_a_recording_yields_the_surprise_of_every_layer():
    module = mixture()
    model = nn.Sequential(module)
    x = axes(0, 1, 2, 2)
    with capture_surprise(model) as wanted:
        model(x).square().sum().backward()
    with living(model).recording() as found:
        model(x).square().sum().backward()
    assert list(found) == list(wanted) == ["0"]
    assert torch.equal(found["0"], wanted["0"])


def test_an_error_while_recording_adds_no_surprise():
    module = mixture()
    life = living(module)

    def broken() -> None:
        with life.recording():
            module(axes(0, 1)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    life.step()
    assert not module.life.surprise.any()
    with capture_surprise(module), pytest.raises(RuntimeError, match="a mixture is already captured"), life.recording():
        pass


def test_a_scale_of_the_loss_is_undone():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    found = []
    for used in (None, scaler):
        module = mixture()
        life = living(module)
        with life.recording(used):
            loss = module(axes(0, 1, 2)).square().sum()
            (loss if used is None else used.scale(loss)).backward()
        life.step()
        found.append(module.life.surprise)
    assert found[0][:3].all()
    torch.testing.assert_close(found[1], found[0])


def test_a_step_of_surprise_learning_records_too(window):
    module = mixture(gating_loss="surprise", surprise_kind="expert")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    life = ExpertLifecycle(module, optimizer, pruning_threshold=0.01)
    step = HyperStep(module, optimizer, accumulation_steps=2)
    events = []
    for number in range(4 * window):
        with life.recording():
            result = step(lambda number=number: (module(tokens(30, F, seed=number)) - 1).square().mean())
        events += life.step() if result.stepped else []
    assert life.steps == 2 * window
    assert module.life.surprise[:3].all()
    assert int(module.life.window[E]) == 0  # decided at the last step
    assert int(module.life.activations.sum()) >= 4 * window * 30  # min_experts is 1, and nobody was recycled
    assert events == []


# ---- recycling


def test_an_expert_below_the_threshold_is_recycled_in_place_after_a_window():
    module = mixture(4)
    before = copy.deepcopy(module.state_dict())
    x = axes(*[0] * 10, *[1] * 9, 2)  # expert 2 has exactly a share of 1/20, expert 3 none
    life = living(module, pruning_threshold=0.05)
    assert run(life, x, 99) == []
    assert run(life, x, 1) == [LifeEvent(100, "", "recycling", 3, 0.0, 100, False)]
    own, router = module.life, module.router
    assert own.activations.tolist() == [1000, 900, 100, 0, 0]
    assert own.birth_step.tolist() == [0, 0, 0, 100, -1]
    assert own.lives.tolist() == [1, 1, 1, 2, 0]
    for name, value in module.state_dict().items():
        if name.startswith("life") or name.endswith("expert_mask"):
            continue
        rows = [row for row in range(E) if not torch.equal(value[row], before[name][row])]
        assert rows == ([] if name.endswith("thresholds") else [3]), name  # the mean of equal thresholds is theirs
    for weight in (module.gate_up_proj, module.down_proj):
        bound = weight.shape[-1] ** -0.5
        assert 0.5 * bound < weight[3].abs().max() <= bound
    assert router.prototypes[3].norm().item() == pytest.approx(1)  # the mean length of the others
    assert run(life, x, 99) == []
    assert run(life, x, 1)[0][2:6] == ("recycling", 3, 0.0, 100)


def test_a_recycled_expert_points_to_unserved_tokens_where_there_are_any(window):
    module = mixture(4)
    with torch.no_grad():
        module.router.prototypes.mul_(torch.tensor([2.0, 3.0, 1.0, 1.0, 1.0]).unsqueeze(-1))
        module.router.thresholds.copy_(torch.tensor([1.0, 2.0, 7.0, 7.0, 7.0]))
    life = living(module, pruning_threshold=0.01)
    events = run(life, axes(0, 0, 1, 5, 5, 6), window)
    assert [(event.expert, event.from_tokens) for event in events] == [(2, True), (3, False)]
    length = (2.0 + 3.0) / 2  # of those that stay
    wanted = torch.tensor([0, 0, 0, 0, 0, 2.0, 1.0, 0]) / math.sqrt(5) * length
    torch.testing.assert_close(module.router.prototypes[2].detach(), wanted)
    torch.testing.assert_close(module.router.prototypes[3].norm().item(), length)
    assert module.router.thresholds[2:4].tolist() == [1.5, 1.5]
    # The new expert serves the tokens that nobody served.
    assert module.route(axes(5, 6)).top_k_index[:, 0].tolist() == [2, 2]


def test_a_budget_serves_every_token_so_a_recycled_expert_points_in_a_random_direction(window):
    module = mixture(4, routing="budget", combine="softmax", surprise_budget=0.1)
    module.router.thresholds.requires_grad_(False).fill_(9)
    events = run(living(module, pruning_threshold=0.1), axes(0, 1, 2, 2), window)
    assert [(event.expert, event.from_tokens) for event in events] == [(3, False)]
    assert module.router.prototypes[3].norm().item() == pytest.approx(1)
    assert module.router.thresholds[3] == 9


def test_experts_woken_by_hand_are_left_a_whole_window(window):
    module = mixture(3)
    life = living(module, pruning_threshold=0.01)
    x = axes(0, 1, 2)
    run(life, x, 1)
    module.router.expert_mask[3] = True
    assert run(life, x, window - 1) == []
    assert module.life.birth_step.tolist() == [0, 0, 0, 2, -1]
    assert [event[:4] for event in run(life, x, window)] == [(2 * window, "", "recycling", 3)]


def test_a_window_without_a_token_decides_nothing(window):
    module = mixture(4)
    life = living(module, pruning_threshold=0.5, growth_threshold=0.0)
    assert run(life, torch.zeros(0, F), 3 * window) == []
    assert int(module.life.over) == 0


def test_fresh_weights_depend_on_their_seed_alone():
    module = mixture(bias=True)
    state, parameters = torch.get_rng_state(), module.expert_parameters()
    fresh = module.fresh_experts(2, 5)
    torch.manual_seed(9)
    again, other = module.fresh_experts(2, 5), module.fresh_experts(2, 6)
    torch.set_rng_state(state)
    assert fresh.keys() == parameters.keys()
    for name, value in fresh.items():
        assert value.shape == (2, *parameters[name].shape[1:])
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        assert module.expert_parameters()[name] is parameters[name]
    module.fresh_experts(1, 1)
    assert torch.equal(torch.get_rng_state(), state)


# ---- births


def test_unserved_tokens_that_stay_wake_an_expert_which_serves_them():
    module = mixture()
    life = living(module, growth_threshold=0.2)
    before = module.gate_up_proj.detach().clone()
    x = axes(0, 1, 2, 0, 1, 2, 0, 5, 5, 6)  # a share of 0.3
    assert run(life, x, 199) == []
    events = run(life, x, 1)
    assert [event[:4] for event in events] == [(200, "", "birth", 3)]
    assert events[0].share == pytest.approx(0.3)
    assert events[0].from_tokens
    assert module.router.expert_mask.tolist() == [True] * 4 + [False]
    torch.testing.assert_close(module.router.prototypes[3].detach(), torch.tensor([0, 0, 0, 0, 0, 2.0, 1.0, 0]) / math.sqrt(5))
    assert not torch.equal(module.gate_up_proj[3], before[3])
    assert torch.equal(module.gate_up_proj[4], before[4])
    assert module.life.birth_step.tolist() == [0, 0, 0, 200, -1]
    assert run(life, x, 200) == []  # all are served now
    assert module.life.activations[3] == 200 * 3


@pytest.mark.parametrize("shares", [(0.2, 0.2, 0.2), (0.3, 0.1, 0.3, 0.1)], ids=["at the threshold", "not two windows in a row"])
def test_too_few_unserved_tokens_wake_nobody(shares, window):
    life = living(mixture(), growth_threshold=0.2)
    for share in shares:
        unserved = round(10 * share)
        assert run(life, axes(*[5] * unserved, *[0] * (10 - unserved)), window) == []


def test_births_end_with_the_pool(window):
    module = mixture()
    life = living(module, growth_threshold=0.0)
    with torch.no_grad():
        module.router.thresholds.fill_(9)  # nobody serves anything
    events = run(life, axes(0, 1, 5, 6), 6 * window)
    assert [event.expert for event in events] == [3, 4]
    assert module.router.expert_mask.all()


@pytest.mark.parametrize("thresholds", ["balanced", "quantile"])
def test_running_thresholds_start_at_the_mean_and_are_not_moved_by_what_an_expert_recorded_before(thresholds, window):
    torch.manual_seed(0)
    module = DynMoE(F, 4, 3, max_num_experts=E, target_k=1, thresholds=thresholds, level=0.0, demand=0.0, max_experts=E)
    life = living(module, pruning_threshold=0.5)  # of three experts with a share of 1/3 each
    for number in range(window):
        module(tokens(60, F, seed=number)).square().mean().backward()
        events = life.step(0.5)  # 3 · 17/32 of credit: one of them is recycled
    (expert,) = (event.expert for event in events)
    before = module.router.thresholds.clone()
    others = [other for other in range(3) if other != expert]
    torch.testing.assert_close(before[expert], before[others].mean())
    module(tokens(60, F, seed=9))  # applies what was recorded before the new expert began
    torch.testing.assert_close(module.router.thresholds[expert], before[expert])
    assert int(module.router.updates) == window


class Scales(Routed):
    """Another layer with routed experts: out = Σ w · (a_e * x), with the a_e in a submodule. Only some tokens are active."""

    def __init__(self) -> None:
        super().__init__(
            F, 3, E, target_k=1, routing="threshold", surprise_budget=None, gating_loss="none", surprise_kind="down_proj",
            thresholds="learned", form="linear", scale=1.0, min_experts=1, max_experts=E, combine=None, level=None, demand=None,
            device=None, dtype=None,
        )  # fmt: skip
        self.bank = nn.ParameterDict({"a": torch.ones(E, F)})

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        return {"bank.a": self.bank["a"]}

    @torch.no_grad()
    def reset_experts(self, experts: Tensor | None = None) -> None:
        self.bank["a"][slice(None) if experts is None else experts] = torch.rand(1)

    def forward(self, x: Tensor) -> Tensor:
        _, routing, _ = self._routed(x, None, None, active=x[:, 0] == 0)
        used = (routing.top_k_index < E).unsqueeze(-1)
        scale = torch.where(used, self.bank["a"][routing.top_k_index.clamp(max=E - 1)], 0)
        return (routing.top_k_weights.unsqueeze(-1) * scale).sum(1) * x


def test_every_layer_with_routed_experts_has_a_life(window):
    module = Scales()
    with torch.no_grad():
        module.router.prototypes.copy_(torch.eye(E, F))
        module.router.thresholds.fill_(1)
    life = living(module, growth_threshold=0.3, pruning_threshold=0.1)
    events = []
    for _ in range(2 * window):
        with life.recording():
            module(axes(0, 0, 1, 2, 6, 6)).sum().backward()  # tokens of axis 0 are not active
        events += life.step()
    assert [event[:4] for event in events] == [(2 * window, "", "birth", 3)]
    assert events[0].share == 0.5
    # By the rule of min_experts, the unserved tokens went to expert 0.
    assert module.life.activations.tolist() == [4 * window, 2 * window, 2 * window, 0, 0]
    assert (module.bank["a"][[0, 1, 2, 4]] == 1).all()
    assert (module.bank["a"][3] < 1).all()
    torch.testing.assert_close(module.router.prototypes[3].detach(), torch.eye(F)[6])


# ---- PI


def test_the_rate_of_births_falls_from_its_ceiling_to_its_floor(monkeypatch):
    monkeypatch.setattr(lifecycle, "WINDOW", 1)
    when = {}
    for integrity in (0.0, 0.5, 1.0, None):
        module = mixture()
        with torch.no_grad():
            module.router.thresholds.fill_(9)
        when[integrity] = [event.step for event in run(living(module, growth_threshold=0.0), axes(0, 1, 5), 40, integrity)]
    floor = regeneration_rate(1.0, floor=lifecycle.FLOOR, ceiling=lifecycle.CEILING)
    assert (floor, lifecycle.CEILING) == (1 / 16, 1)
    assert when[0.0] == when[None] == [2, 3]  # each window, from the second with unserved tokens on
    assert when[0.5] == [3, 5]  # 17/32 a window
    assert when[1.0] == [17, 33]  # every sixteenth


def test_the_rate_of_recycling_falls_likewise_and_the_least_used_go_first(monkeypatch):
    monkeypatch.setattr(lifecycle, "WINDOW", 1)
    x = axes(*[0] * 10, 1, 1, 2)
    at_once = run(living(mixture(4), pruning_threshold=0.2), x, 1, 0.0)
    assert [event.expert for event in at_once] == [3, 2, 1]
    slowly = run(living(mixture(4), pruning_threshold=0.2), x, 6, 1.0)
    assert [(event.step, event.expert) for event in slowly] == [(6, 3)]  # 3/16 a window


def test_integrity_is_smoothed_and_steps_without_one_do_not_count():
    life = living(mixture())
    assert life.integrity is None
    wanted, values = 0.0, np.random.default_rng(0).uniform(size=80)
    for number, value in enumerate(values):
        life.step(float("nan") if number % 2 else None)
        life.step(torch.tensor(value, dtype=torch.float64) if number % 2 else float(value))
        wanted += max(1 / (number + 1), 0.02) * (value - wanted)
    assert life.integrity == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("switches", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_integrity_drives_the_weights_of_the_routers_loss_if_switched_on(switches, window):
    life = living(mixture(), w_ce=switches[0], w_kl=switches[1])
    given = {"w_ce": 2.0, "w_kl": 0.5, "temperature": 3.0}
    assert life.surprise_loss(given) == SurpriseLoss(2.0, 0.5, 3.0)  # before the first window
    run(life, axes(0, 1), window, 0.5)
    rate = 17 / 32
    wanted = SurpriseLoss(2.0 * (rate if switches[0] else 1), 0.5 * (rate if switches[1] else 1), 3.0)
    assert life.surprise_loss(given) == life.surprise_loss(SurpriseLoss(**given)) == wanted
    assert life.surprise_loss().w_ce == (rate if switches[0] else 1)


# ---- optimisers


OPTIMISERS = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), {"momentum_buffer"}),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-3), {"row_var", "col_var", "variance"}),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("apart", [False, True], ids=["one", "router apart"])
def test_only_the_state_of_a_new_experts_rows_is_forgotten(kind, apart, window):
    make, keys = OPTIMISERS[kind]
    module = nn.Sequential(nn.Linear(F, F), mixture(bias=True))
    routers = list(module[1].router.parameters())
    others = [p for p in module.parameters() if not any(p is one for one in routers)]
    optimisers = [make(others), make(routers)] if apart else [make(module.parameters())]
    life = ExpertLifecycle(module, optimisers if apart else optimisers[0], growth_threshold=0.0, seed=3)
    with torch.no_grad():
        module[1].router.thresholds.fill_(9)
    for number in range(2 * window):
        module(tokens(30, F, seed=number)).square().sum().backward()
        (module[1].router.prototypes.square().sum() + module[1].router.thresholds.sum()).backward()
        for optimizer in optimisers:
            optimizer.step()
            optimizer.zero_grad()
        before = [copy.deepcopy(dict(optimizer.state)) for optimizer in optimisers]
        events = life.step()
    assert [event.expert for event in events] == [3]
    of_experts = {id(p) for p in [*module[1].expert_parameters().values(), *routers]}
    seen = set()
    for optimizer, states in zip(optimisers, before, strict=True):
        for (parameter, state), old in zip(optimizer.state.items(), states.values(), strict=True):
            for key, value in state.items():
                if id(parameter) in of_experts and key in keys and len(value) == E:
                    seen.add(key)
                    assert not value[3].any()
                    kept = [0, 1, 2, 4]
                    assert torch.equal(value[kept], old[key][kept])
                    assert old[key][:3].any()
                else:
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(old[key])), key
    assert seen == keys


# ---- the operator; compiled, in half precision, copied


def test_the_operator_is_registered_as_torch_wants_it():
    routing = mixture().route(axes(0, 1, 5))
    mask, pending = torch.tensor([True, False, True]), torch.zeros(2 * E + 2 + F, dtype=torch.float64)
    index, weights, _, scores = (part.detach() for part in routing)
    given = (axes(0, 1, 5), index, weights, scores, mask)
    torch.library.opcheck(torch.ops.tinyonn.record_life.default, (*given, pending.clone()))
    torch.ops.tinyonn.record_life(*given, pending)
    assert pending[E:][: E + 2].tolist() == [2, 0, 0, 0, 0, 2, 1]


def test_graphs_compiled_before_a_birth_stay_valid(window):
    from torch._dynamo.testing import CompileCounterWithBackend

    module = nn.Sequential(nn.Linear(F, F), mixture(4))
    life = ExpertLifecycle(module, torch.optim.AdamW(module.parameters(), lr=1e-3), pruning_threshold=0.3, growth_threshold=0.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    events: list[LifeEvent] = []
    for number in range(4 * window):
        with life.recording():
            compiled(tokens(30, F, seed=number)).square().mean().backward()
        life.optimizers[0].step()
        life.optimizers[0].zero_grad()
        events += life.step()
        if number == 0:
            compilations = counter.frame_count
    assert {event.kind for event in events} == {"birth", "recycling"}
    assert counter.frame_count == compilations == 1
    x = 3 * tokens(200, F, seed=99)
    assert (module[1].route(module[0](x)).top_k_index == 4).any()  # the new expert is used
    with life.recording():
        torch.testing.assert_close(compiled(tokens(30, F, seed=5)), module(tokens(30, F, seed=5)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_numbers_keep_their_precision_in_a_model_of_another(dtype, window):
    module = nn.Sequential(mixture())
    life = living(module, growth_threshold=0.2)
    module.to(dtype)
    own = module[0].life
    assert {own.surprise.dtype, own.window.dtype, own.credit.dtype, own.pending.dtype} == {torch.float64}
    assert {own.activations.dtype, own.birth_step.dtype} == {torch.int64}
    for _ in range(2 * window):
        with life.recording():
            module(axes(0, 1, 5, 5).to(dtype)).square().sum().backward()
        events = life.step(0.0)
    assert [event.expert for event in events] == [3]
    assert own.surprise[:2].all()
    assert module[0].down_proj.dtype == dtype
    torch.testing.assert_close(module[0].router.prototypes[3], torch.eye(F, dtype=dtype)[5])


def test_a_copy_has_a_life_of_its_own():
    module = mixture()
    living(module)
    other = copy.deepcopy(module)
    other(axes(0, 1))
    assert not module.life.pending.any()
    assert other.life.pending.any()


# ---- files, seeds


def trained(seed: int, steps: int, start: dict | None = None) -> tuple[list[LifeEvent], dict]:
    torch.manual_seed(1)
    layers = [DynMoE(F, 4, 3, max_num_experts=6, target_k=1.5, bias=True, **options) for options in ({}, {"thresholds": "learned"})]
    model = nn.Sequential(nn.Linear(F, F), *layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    life = ExpertLifecycle(model, optimizer, pruning_threshold=0.45, growth_threshold=0.01, seed=seed)
    if start is not None:
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
        life.load_state_dict(start["life"])
    events = []
    for number in range(life.steps, steps):
        torch.manual_seed(1000 + number)  # nothing else that is drawn matters
        x = torch.randn(40, F)
        with life.recording():
            loss = (model(x) - x.sin()).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        events += life.step((-loss).exp().detach())
    return events, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "life": life.state_dict()}


def same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("stop", [7, 12], ids=["within a window", "after one"])
def test_a_resumed_run_makes_the_same_decisions_to_the_bit(stop, window, tmp_path):
    events, state = trained(0, 24)
    assert {event.kind for event in events} == {"birth", "recycling"}
    first, half = trained(0, stop)
    torch.save(half, tmp_path / "half.pt")
    rest, resumed = trained(0, 24, torch.load(tmp_path / "half.pt"))
    assert first + rest == events
    assert same(resumed, state)


def test_a_seed_decides_what_is_drawn(window):
    events, state = trained(0, 12)
    again, other = trained(0, 12), trained(1, 12)
    assert again[0] == events
    assert same(again[1], state)
    assert events[0][:4] == other[0][0][:4]
    assert not same(other[1]["model"], state["model"])


def test_a_model_is_loaded_with_and_without_a_recorded_life():
    recorded, plain = mixture(), mixture()
    life = living(recorded)
    run(life, axes(0, 1, 1), 2)
    again = mixture()
    again.load_state_dict(recorded.state_dict())
    assert again.life.activations.tolist() == [2, 4, 0, 0, 0]
    recorded.load_state_dict(plain.state_dict())  # a life that begins anew
    run(life, axes(0), 1)
    assert recorded.life.activations.tolist() == [1, 0, 0, 0, 0]
    assert recorded.life.birth_step.tolist() == [3, 3, 3, -1, -1]
    recorded.load_state_dict({"down_proj": plain.down_proj}, strict=False)
    assert recorded.life.activations.tolist() == [1, 0, 0, 0, 0]


# ---- errors


def frozen() -> DynMoE:
    module = mixture()
    module.down_proj.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (mixture, {"pruning_threshold": 1.5}, ValueError, "pruning_threshold must be at least 0 and at most 1, got 1.5."),
        (mixture, {"growth_threshold": -0.1}, ValueError, "growth_threshold must be at least 0 and at most 1, got -0.1."),
        (mixture, {"growth_threshold": "0.1"}, TypeError, "growth_threshold must be a number, got str."),
        (mixture, {"seed": -1}, ValueError, "seed must be at least 0, got -1."),
        (mixture, {"seed": 0.5}, TypeError, "seed must be an int, got float."),
        (mixture, {"w_ce": 0.5}, TypeError, "w_ce must be True or False, got 0.5."),
        (mixture, {"w_kl": None}, TypeError, "w_kl must be True or False, got None."),
        (lambda: mixture(E), {"growth_threshold": 0.1}, ValueError,
         "growth_threshold must be None unless a layer has an inactive expert, got 0.1 with all experts live; make the layers with "
         "max_num_experts above num_experts."),
        (lambda: nn.Sequential(DynMoE(F, 4, 3, max_num_experts=E, routing="budget")), {"growth_threshold": 0.1}, ValueError,
         "growth_threshold must be None with routing='budget', which serves every token, got 0.1 and '0'."),
        (lambda: nn.Linear(2, 2), {}, TypeError, "model contains no tinyonn.nn.DynMoE or DynSMHA layer (got Linear)."),
        (frozen, {"pruning_threshold": 0.1}, ValueError,
         "down_proj must require a gradient, because new experts start from random weights."),
    ],
)  # fmt: skip
def test_bad_settings_are_one_clear_line(make, options, error, message):
    with pytest.raises(error) as caught:
        living(make(), **options)
    assert str(caught.value) == message


def test_optimisers_that_do_not_fit_are_named():
    module = mixture()
    with pytest.raises(TypeError, match=r"^optimizer must be a torch.optim.Optimizer or a list of them, got int\.$"):
        ExpertLifecycle(module, 3)
    router = torch.optim.SGD(module.router.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^gate_up_proj must be in one optimiser, got 0\.$"):
        ExpertLifecycle(module, router, pruning_threshold=0.1)
    with pytest.raises(ValueError, match=r"^router.prototypes must be in one optimiser, got 2\.$"):
        ExpertLifecycle(module, [still(module), router], pruning_threshold=0.1)
    ExpertLifecycle(module, router)  # nothing is written, so nothing is needed


def test_a_state_of_codes_is_refused(window):
    module = mixture(4)
    life = living(module, pruning_threshold=0.1)
    life.optimizers[0].state[module.down_proj] = {"state1": torch.zeros(module.down_proj.shape, dtype=torch.uint8)}
    with pytest.raises(TypeError, match=r"^optimizer must keep its state as floats, got torch.uint8 for state1, of which no row"):
        run(life, axes(0, 1, 2), window)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (1.5, ValueError, "integrity must be at least 0 and at most 1, got 1.5."),
        ("high", TypeError, "integrity must be a number, got str."),
        (torch.zeros(3), TypeError, "integrity must be a number or a 0-d tensor of floats, got torch.float32 of shape (3,)."),
        (torch.tensor(2.0), ValueError, "integrity must be at least 0 and at most 1, got 2.0."),
    ],
)
def test_an_integrity_that_is_none_is_named(given, error, message):
    life = living(mixture())
    with tinyonn.debug(), pytest.raises(error) as caught:
        life.step(given)
    assert str(caught.value) == message
    assert life.steps == 0


def test_a_state_of_another_run_is_named():
    life = living(mixture(), seed=1)
    with pytest.raises(ValueError, match=r"^state_dict must have the keys steps, rate, seed, integrity, known, got step\.$"):
        life.load_state_dict({"step": 1})
    with pytest.raises(ValueError, match=r"^seed must be 0 as in the saved run, got 1\.$"):
        life.load_state_dict(living(mixture()).state_dict())
