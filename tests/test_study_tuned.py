"""The study of tuned conversions: its budget, its intervals, and that it goes on where it was interrupted."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tinyonn.testing.models import tiny_causal_lm

FOLDER = Path(__file__).parents[1] / "benchmarks" / "studies"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The study with a small model and random texts."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(FOLDER))
    import tuned

    class Texts:
        def __init__(self, tokens: int) -> None:
            self.tokens = tokens

        def of(self, *text: object) -> torch.Tensor:
            return self._row(zlib.crc32(str(text).encode()) % 1000)

        def training(self, seed: int, step: int) -> torch.Tensor:
            return self._row(1000 + 100 * seed + step)

        def _row(self, seed: int) -> torch.Tensor:
            return torch.randint(90, (1, self.tokens), generator=torch.Generator().manual_seed(seed))

    model = tiny_causal_lm("llama")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tuned, "prepare_smollm2", lambda: tmp_path / "model")
    monkeypatch.setattr(tuned, "Texts", Texts)
    yield tuned
    for name in ("tuned_tries", "tuned", "_tuned_page", "_study"):
        sys.modules.pop(name, None)


@pytest.fixture
def settings(tuned):
    return tuned.Settings(tokens=512, share=0.85, steps=4, distil_steps=3, rows=2, seeds=(0, 1), save_every=2)


@pytest.mark.parametrize("layers", [1, 7, 30])
def test_blocks_of_the_static_arm_have_the_target_as_their_mean(tuned, layers):
    settings = tuned.Settings()
    place = torch.arange(settings.tokens)
    numbers = torch.tensor(settings.numbers(layers))
    read = torch.minimum(place // 64 + 1, numbers[:, None]).double().mean().item()
    assert abs(read - settings.target) <= 0.5 / layers
    assert read == pytest.approx(settings.budget(layers))
    assert numbers.max() - numbers.min() <= 1
    assert settings.target == pytest.approx(0.25 * 16.5)


def test_excess_perplexity_is_that_of_the_mean_gap_and_its_interval_holds_it(tuned):
    import _tuned_page

    gap = torch.tensor([[0.01, 0.03], [0.02, 0.06]], dtype=torch.float64)
    middle, low, high = _tuned_page.relative(gap, torch.zeros_like(gap))
    assert middle == pytest.approx(math.exp(0.03) - 1)
    assert low < math.exp(0.02) - 1 < middle < math.exp(0.04) - 1 < high  # wider than the means of the two seeds, and of the two texts
    half = torch.full((2, 3), 0.5, dtype=torch.float64)
    assert _tuned_page.relative(half, torch.zeros_like(half)) == pytest.approx([math.exp(0.5) - 1] * 3)


@pytest.mark.parametrize(
    "arm", ["dense", pytest.param("static top-n", marks=pytest.mark.slow), pytest.param("one price", marks=pytest.mark.slow)]
)
def test_interrupted_tuning_ends_as_an_uninterrupted_one(tuned, settings, arm, tmp_path, monkeypatch):
    whole = tuned.Run(settings, arm, 0, tmp_path / "whole")
    whole.tune()
    training, calls = tuned.Texts.training, []

    def interrupted(self, seed, step):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return training(self, seed, step)

    monkeypatch.setattr(tuned.Texts, "training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned.Run(settings, arm, 0, tmp_path / "parts").tune()
    resumed = tuned.Run(settings, arm, 0, tmp_path / "parts")
    resumed.tune()
    assert calls == [0, 1, 2, 3, 2, 3]
    state = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert any(value.any() for name, value in state.items() if "lora_B" in name)


def test_sparse_arms_read_equal_numbers_of_blocks(tuned, settings, tmp_path):
    static = tuned.Run(settings, "static top-n", tuned.BEFORE, tmp_path).measured()
    price = tuned.Run(settings, "one price", tuned.BEFORE, tmp_path).measured()
    numbers = settings.numbers(len(static["far by layer"]))
    assert numbers == [5, 5, 6]  # of 1, 2, 3, 4, 5 and then as many or one more
    assert static["blocks"] == pytest.approx((3.75 + 3.75 + 4.125) / 3)
    assert price["blocks"] == pytest.approx(static["blocks"], rel=0.01)
    assert len(price["losses"]) == len(price["kinds"]) == 2
    assert static["far"] == pytest.approx(static["blocks"] - sum(min(block + 1, 3) for block in range(8)) / 8)


@pytest.mark.slow
def test_study_that_has_run_whole_writes_its_page_and_figure(tuned, settings, tmp_path):
    import _tuned_page
    from _study import Results

    results = Results(tmp_path / "tuned.json", {"some": 1})
    tuned.run(settings, results, tmp_path / "states", 1)
    _tuned_page.write(tmp_path, results, settings)
    lines = (tmp_path / "tuned.md").read_text().splitlines()
    assert sum(line.startswith(("| dense |", "| static top-n |", "| one price |")) for line in lines) == 6
    assert (tmp_path / "tuned.png").stat().st_size > 10_000
    cells = dict(results.cells)
    tuned.run(settings, results, tmp_path / "none", 1)  # nothing is measured again
    assert not (tmp_path / "none").exists()
    assert results.cells == cells


@pytest.mark.slow
def test_tries_change_what_they_say_and_write_their_page(tuned, settings, tmp_path):
    import tuned_tries
    from _study import Results

    from tinyonn.hf.dyn_nsa import cores

    one = replace(settings, seeds=(0,))
    results = Results(tmp_path / "tries.json", {"some": 1})
    tuned_tries.run(one, results, tmp_path / "states", 1)
    lines = tuned_tries.page(results, one)
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert set(tuned_tries.TOLD) <= set(rows)
    assert rows["as in the study"][2:4] == rows["offsets again"][2:4]
    keys = float(rows["as in the study"][3])
    assert float(rows["blocks of 32"][2]) == pytest.approx(keys / 32, rel=0.03)
    losses = {what: results.get("one price", what, 0)["losses"] for what in tuned_tries.TOLD}
    assert len({tuple(loss) for loss in losses.values()}) == len(losses)

    def tuned_as(what: str) -> tuned_tries.Try:
        made = tuned_tries.Try(tuned_tries.settings_of(one, what), "one price", 0, tmp_path / "states", what)
        made.tune()
        return made

    plain, again, keys_again = (tuned_as(what) for what in ("as in the study", "offsets again", "keys and offsets again"))
    for first, second, third in zip(*map(cores, (plain.model, again.model, keys_again.model)), strict=True):
        assert first.options.temperature == second.options.temperature == third.options.temperature
        assert torch.equal(first.compress_key.position, second.compress_key.position)
        assert not torch.equal(first.base, second.base)
        assert not torch.equal(first.compress_key.position, third.compress_key.position)
    assert {core.options.block_size for core in cores(tuned_as("blocks of 32").model)} == {32}
    assert {core.options.distil_weight for core in cores(tuned_as("keys learn on").model)} == {1.0}
    states = {path.parent.name: torch.load(path, weights_only=False)["step"] for path in (tmp_path / "states").glob("*/one_price_0.pt")}
    assert states == {"as_in_the_study": 4, "keys_learn_on": 4, "twice_the_steps": 8, "blocks_of_32": 4}
