"""The studies of benchmarks/studies: what they ask of a model, and that each goes on where it was interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tinyonn.cli.demo.smollm2 import smollm2_folder
from tinyonn.nn import DynNSAOptions
from tinyonn.nn.dyn_nsa import DynNSACore
from tinyonn.testing import save_tiny_model

FOLDER = Path(__file__).parents[1] / "benchmarks" / "studies"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")


@pytest.fixture(scope="module")
def recall() -> Iterator[ModuleType]:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(FOLDER))
    try:
        import recall

        yield recall
    finally:
        sys.path.remove(str(FOLDER))


def test_questions_of_recall_have_the_value_that_most_facts_hold(recall):
    from _recall_task import ANSWER, FACT, QUESTION, TRAINING, VALUES

    settings = recall.Settings(tokens=512)
    ids, text, answers, demands = recall.Rows(settings, TRAINING).draw(3, 4)
    for row in range(4):
        facts: dict[int, list[tuple[int, int]]] = {}
        for place in ((ids[row] >= FACT) & (ids[row] < QUESTION)).nonzero()[:, 0].tolist():
            key, value = divmod(ids[row, place].item() - FACT, VALUES)
            facts.setdefault(key, []).append((place // settings.block, value))
        asked = (demands[row] > 0).nonzero()[:, 0].tolist()
        assert len(asked) == 4 * settings.asked
        assert {ids[row, place].item() - QUESTION for place in asked} == set(facts)
        for place in asked:
            blocks, values = zip(*facts[ids[row, place].item() - QUESTION], strict=True)
            assert len(set(blocks)) == len(blocks) == demands[row, place]
            (best, most), *others = Counter(values).most_common()
            assert answers[row, place] == ANSWER + best
            assert all(number < most for _, number in others)
            assert max(blocks) < place // settings.block - 1  # not among the forced ones
            assert min(blocks) > 0
    following = text[:, :-1]
    assert (following[following >= 0] == ids[:, 1:][following >= 0]).all()
    assert following[following >= 0].max() < FACT


def test_target_of_recall_is_what_a_static_top_n_reads(recall):
    settings = recall.Settings(tokens=512, top_n=5)
    place = torch.arange(512)
    assert settings.target == pytest.approx((place // 16 + 1).clamp(max=5).float().mean().item())


@pytest.mark.parametrize("arm", ["dense", "static top-n"])
def test_interrupted_run_of_recall_ends_as_an_uninterrupted_one(recall, arm, tmp_path, monkeypatch):
    settings = recall.Settings(
        tokens=256, width=16, layers=1, batch=1, steps=8, distil_steps=2, again_every=2, again_steps=1, rows=1, seeds=(0,)
    )
    monkeypatch.setattr(recall, "SAVE_EVERY", 2)
    whole = recall.Run(settings, arm, 0, None)
    whole.train()
    losses, calls = recall.Run._losses, 0

    def interrupted(self, *args):
        nonlocal calls
        calls += 1
        if calls in (2, 6):
            raise KeyboardInterrupt
        return losses(self, *args)

    monkeypatch.setattr(recall.Run, "_losses", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recall.Run(settings, arm, 0, tmp_path).train()
    resumed = recall.Run(settings, arm, 0, tmp_path)
    resumed.train()
    assert calls < 14
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def experts() -> Iterator[ModuleType]:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(FOLDER))
    try:
        import experts

        yield experts
    finally:
        sys.path.remove(str(FOLDER))


def small(experts: ModuleType, **changes: object) -> Any:
    sizes = {"width": 32, "layers": 2, "experts": 8, "neurons": 8, "k": 2, "tokens": 32, "steps": 3, "rows": 16}
    return experts.Settings(**{**sizes, **changes})


def test_mixtures_of_a_seed_start_from_the_same_weights(experts):
    from _experts_model import ARMS, DENSE, new_model

    def weights(arm: str, seed: int) -> list[torch.Tensor]:
        layers = new_model(small(experts), arm, seed).model.layers
        router = "prototypes" if hasattr(layers[0].mlp.router, "prototypes") else "weight"
        every = [(layer.mlp.gate_up_proj, layer.mlp.down_proj, getattr(layer.mlp.router, router)) for layer in layers]
        return [layers[1].self_attn.q_proj.weight, *(weight for layer in every for weight in layer)]

    arms = [arm for arm in ARMS if arm != DENSE]
    for arm in arms[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights(arms[0], 3), weights(arm, 3), strict=True)), arm
    assert not any(torch.equal(a, b) for a, b in zip(weights(arms[0], 3), weights(arms[0], 4), strict=True))


def test_routing_of_other_methods_by_hand(experts):
    from _experts_model import BALANCE, LOSS_FREE, RELU, SWITCH, Mixture

    torch.manual_seed(0)
    logits, settings = torch.randn(50, 8), small(experts)
    switch = Mixture(settings, SWITCH)
    index, weights = switch.choose(logits)
    shares, count = logits.exp() / logits.exp().sum(-1, keepdim=True), torch.zeros(8)
    for token in range(50):
        best = sorted(range(8), key=lambda e: -logits[token, e])[:2]
        assert index[token].tolist() == best
        torch.testing.assert_close(weights[token], shares[token, best] / shares[token, best].sum())
        count[best] += 1
    torch.testing.assert_close(switch.loss, BALANCE * 8 * (count / 100 * shares.mean(0)).sum())

    free = Mixture(settings, LOSS_FREE)
    free.bias.copy_(torch.linspace(0, 1, 8))
    before, (index, weights) = free.bias.clone(), free.choose(logits)
    assert (index == (logits.sigmoid() + before).topk(2).indices).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    load = torch.bincount(index.flatten(), minlength=8)
    assert ((free.bias - before).sign() == (100 / 8 - load).sign()).all()

    relu = Mixture(settings, RELU)
    index, weights = relu.choose(logits)
    for token in range(50):
        chosen = {e for e in range(8) if logits[token, e] > 0}
        assert set(index[token].tolist()) - {8} == chosen
        torch.testing.assert_close(weights[token].sum(), logits[token].relu().sum() / 2)
    relu.least = -0.5  # a search for the budget below the threshold: a weight of 0 is no expert
    assert torch.equal(relu.choose(logits)[0], index)
    assert relu.l1 > 1e-8  # more than 2 experts per token make the loss on their number dearer


@pytest.mark.parametrize("arm", ["DynMoE", "ReLU routing", "DynMoE, learned thresholds"])
def test_run_is_evaluated_at_the_budget(experts, arm):
    run = experts.Run(small(experts, rows=64), arm, 0, 1e-3, 3)
    run.train()
    found = run.measured()
    assert len(found["losses"]) == 64
    assert found["loss"] == pytest.approx(sum(found["losses"]) / 64)
    assert found["k"] == pytest.approx(2, abs=0.03)
    assert found["k as trained"] == pytest.approx(sum(found["k by layer"]) / 2)


@pytest.mark.parametrize(("of_seeds", "of_texts"), [(1.0, 0.1), (0.1, 1.0), (1.0, 1.0)], ids=["seeds differ", "texts differ", "both"])
def test_intervals_of_three_seeds_and_eight_texts_hold_the_mean_of_all_others(experts, of_seeds, of_texts):
    from _study import crossed_difference

    torch.manual_seed(0)
    held = 0
    for _ in range(400):
        gap = 5 + of_seeds * torch.randn(3, 1) + of_texts * torch.randn(1, 8) + 0.1 * torch.randn(3, 8)
        theirs = torch.randn(3, 8)
        middle, low, high = crossed_difference((theirs + gap).tolist(), theirs.tolist())
        assert middle == pytest.approx(gap.mean().item(), abs=1e-5)
        held += low <= 5 <= high
    assert held / 400 >= 0.93


def test_intervals_of_a_ratio_hold_it(experts):
    from _study import ratio_of_means

    torch.manual_seed(0)
    held = 0
    for _ in range(400):
        theirs = 0.1 + 0.03 * torch.rand(8)
        ours = 0.6 * theirs + 0.01 * torch.randn(8)
        ratio, low, high = ratio_of_means(ours.tolist(), theirs.tolist())
        assert ratio == pytest.approx((ours.mean() / theirs.mean()).item(), rel=1e-5)
        held += low <= 0.6 <= high
    assert 0.92 <= held / 400 <= 0.99


def test_results_of_other_settings_are_kept_beside_the_new_ones(experts, tmp_path, capsys):
    from _study import Results

    path = tmp_path / "some.json"
    Results(path, {"steps": 1}).measured("arm", 0, by=lambda: {"loss": 1.5})
    again = Results(path, {"steps": 1})
    assert again.measured("arm", 0, by=dict)["loss"] == 1.5
    assert "1 minutes" not in again.origin()
    other = Results(path, {"steps": 2})
    assert other.get("arm", 0) is None
    assert "some.json was measured with other settings (steps); its cells are not used" in capsys.readouterr().err
    assert Results(path, {"steps": 1}).cells["arm | 0"]["loss"] == 1.5  # nothing moves before there is a new cell
    for steps, loss in ((2, 2.5), (3, 3.5)):
        Results(path, {"steps": steps}).measured("arm", 0, by=lambda loss=loss: {"loss": loss})
    kept = {"some.json": (3, 3.5), "some.before2.json": (2, 2.5), "some.before.json": (1, 1.5)}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)
    for name, (steps, loss) in kept.items():
        assert Results(tmp_path / name, {"steps": steps}).cells["arm | 0"]["loss"] == loss


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"settings": {}, "cells": {"arm'], ids=["empty", "object", "list", "cut"])
def test_a_file_of_other_content_is_named(experts, tmp_path, text):
    from _study import Results

    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"some\.json must hold a study's results, but does not \(.*\); move it away or restore it"):
        Results(path, {"steps": 1})
    assert path.read_text() == text


def test_effects_of_blocks_are_those_of_leaving_them_out(experts):
    """Against loops over heads, tokens and blocks, in float64."""
    from _blocks import Blocks, Layer

    tokens, heads, groups, dim, size = 48, 4, 2, 8, 16
    core = DynNSACore(heads, groups, dim, DynNSAOptions(block_size=size, compress_size=size, window=size))
    draw = torch.Generator().manual_seed(0)
    query, key, value, out = (torch.randn(tokens, n, dim, generator=draw) for n in (heads, groups, groups, heads))
    weight = torch.rand(heads, generator=draw)
    effect, mass = Blocks([core]).effects(Layer(query, key, value, out), weight)
    wanted, wanted_mass = torch.zeros(2, groups, tokens, tokens // size, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        for token in range(tokens):
            seen = slice(0, token + 1)
            shares = (key[seen, group].double() @ query[token, head].double() * dim**-0.5).softmax(0)
            whole = shares @ value[seen, group].double()
            for block in range(token // size + 1):
                inside = slice(block * size, min((block + 1) * size, token + 1))
                own = shares[inside].sum()
                lost = shares[inside] @ value[inside, group].double() - own * whole
                wanted[group, token, block] += weight[head] * lost.square().sum()
                wanted_mass[group, token, block] += own / (heads // groups)
    torch.testing.assert_close(effect.double(), wanted, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(mass.double(), wanted_mass, rtol=1e-4, atol=1e-7)


def test_ratios_compare_at_the_blocks_that_the_arm_has_read(experts):
    from _selection_page import Cells
    from _study import Results

    ours, static, texts = ("price and lines", "mean keys"), ("top-n", "mean keys"), ["prose 0", "code a"]
    results = Results(None, {"texts": texts})
    for text, scale in zip(texts, (1.0, 3.0), strict=True):
        for budget, excess in ((4, 0.10), (6, 0.05), (8, 0.03)):
            cell = {"blocks": float(budget), "excess": scale * excess}
            results.cells[f"top-n, mean keys | {text} | {budget}"] = cell
        results.cells[f"price and lines, mean keys | {text} | 6"] = {"blocks": 6.5, "excess": scale * 0.018}
    cells = Cells(results, (4, 6, 8), (static, ours))
    assert cells.static_at(static, "prose 0", 4, 3.5) == pytest.approx(0.1125)  # beyond the first point
    assert cells.static_at(static, "prose 0", 6, 5.0) == pytest.approx(0.075)
    assert cells.static_at(static, "prose 0", 6, 6.5) == pytest.approx(0.045)
    assert cells.static_at(static, "code a", 8, 9.0) == pytest.approx(3 * 0.02)
    assert cells.ratio(ours, static, 6, "") == pytest.approx((0.4, 0.4, 0.4))
    assert cells.best_static(6) == static


@pytest.fixture(scope="module")
def eavi() -> Iterator[ModuleType]:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(FOLDER))
    try:
        import eavi

        yield eavi
    finally:
        sys.path.remove(str(FOLDER))


def test_prompts_of_eavi_name_their_rule_and_answers_follow_it(eavi):
    from _eavi_task import VOCABULARY, draw, key, name

    from tinyonn.arc import FAMILIES
    from tinyonn.arc.families import RULES
    from tinyonn.arc.tokens import INPUT, OUTPUT, TASK

    named = Counter((family, *name(family, number, rule)) for family, rules in RULES.items() for number, rule in enumerate(rules))
    assert set(named.values()) == {1}
    by_name = {(family, *name(family, number, rule)): rule for family, rules in RULES.items() for number, rule in enumerate(rules)}
    rows = draw((5,), 160, 3)
    assert Counter(rows.families) == dict.fromkeys(FAMILIES, 20)
    for prompt, answer, family in zip(rows.prompts, rows.answers, rows.families, strict=True):
        task, number, *rule = prompt[:5].tolist()
        assert (task, FAMILIES[number], prompt[5], prompt[-1]) == (TASK, family, INPUT, OUTPUT)
        given = VOCABULARY.decode(torch.cat([prompt[6:-1], torch.tensor([VOCABULARY.end])])).grid
        assert (by_name[family, *rule].apply(given) == VOCABULARY.decode(answer).grid).all()
    others = draw((6,), 160, 3, {key(prompt) for prompt in rows.prompts[:80]})
    assert len({key(prompt) for prompt in (*rows.prompts[:80], *others.prompts)}) == 240
    again = draw((5,), 160, 3)
    assert all(torch.equal(one, other) for one, other in zip(rows.prompts, again.prompts, strict=True))


def test_scheduled_sampling_of_eavi_mixes_predictions_into_answers_only(eavi):
    from _eavi_task import draw

    from tinyonn.train import alignment

    torch.manual_seed(0)
    model = eavi.TinyOnnForCausalLM(eavi.TinyOnnConfig.bonsai("1m", vocab_size=45, num_hidden_layers=1, attention="full"))
    rows = draw((1,), 16, 3)
    batch = alignment(rows.prompts, rows.answers, rows.answers, **eavi.IDS)
    ids, answers = batch["input_ids"], batch["labels"] != -100
    with torch.no_grad():
        predicted = model.eval()(input_ids=ids, attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert torch.equal(eavi._mixed(model, batch, 0.0, 0), ids)
    whole, half = eavi._mixed(model, batch, 1.0, 0), eavi._mixed(model, batch, 0.5, 0)
    assert model.training
    assert torch.equal(whole[:, 1:][answers[:, 1:]], predicted[:, :-1][answers[:, 1:]])
    assert torch.equal(whole[~answers], ids[~answers])
    replaced = (half != ids).sum() / (whole != ids).sum()
    assert 0.35 < replaced < 0.65


def test_runs_of_eavi_spend_the_same_compute(eavi):
    settings = eavi.Settings(batch=4, budget=4_000, rows=8, marks=(0.5, 1.0))
    for arm in eavi.ARMS:
        found = eavi.run(settings, arm, 1e-3, (0.2, 0.5), 0, 1, settings.budget)
        spent = found["generated"] + 3 * found["trained"]
        assert settings.budget <= spent < 1.3 * settings.budget
        assert len(found["exact"]) == 2
        assert (found["generated"] > 0) == (arm != eavi.TEACHER)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which SmolLM2-135M is a tiny model whose tokens are characters."""
    cache = tmp_path_factory.mktemp("cache")
    save_tiny_model(smollm2_folder(cache), "llama", max_position_embeddings=1024)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("recall.py", "| one price |"), ("experts.py", "| DynMoE |"), ("converted.py", "| thresholds, one price |"),
        ("selection.py", "price and lines, distilled keys | code argparse.py | 4: excess"), ("defaults.py", "| DynMoE |"),
        ("integrity.py", "| life, driven |"), ("eavi.py", "| EAVI, super batch |"),
    ],
)  # fmt: skip
def test_quick_run_prints_its_results_and_writes_nothing(name, row, cache, tmp_path):
    before = sorted(path.name for path in (FOLDER.parents[1] / "docs").rglob("*"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}  # which `make test` sets
    environment["TINYONN_CACHE"] = str(cache)
    command = [sys.executable, str(FOLDER / name), "--quick"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=environment)
    assert found.returncode == 0, found.stderr
    assert row in found.stdout
    assert sorted(path.name for path in (FOLDER.parents[1] / "docs").rglob("*")) == before
