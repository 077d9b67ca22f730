"""What benchmarks do beside measuring: the forms they compare, the page drawn from what was measured, what they time and note."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tinyonn.mscan import Integral, LayoutEntry, MscanWriter, SequenceRecord
from tinyonn.testing.timing import measure

FOLDER = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def forms() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))  # the module imports another of its folder
        yield module("bench_expert_mlp")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return module("expert_dispatch_page")


def pair_by_pair(x: Tensor, up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """One token and one of its experts after another; the gate's rows come first."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for slot, expert in enumerate(index[token].tolist()):
            neurons = down.shape[2]
            hidden = silu(up[expert, :neurons] @ x[token]) * (up[expert, neurons:] @ x[token])
            total = total + weight[token, slot] * (down[expert] @ hidden)
        rows.append(total)
    return torch.stack(rows)


def test_every_form_of_the_mixture_gives_the_same_output_and_gradients(forms):
    c = forms.case(9, 16, 6, 8, 3, "cpu")
    expected = forms.step(c, lambda: (pair_by_pair(c.x, c.up, c.down, c.index, c.weight), c.leaves))
    forwards = forms.forwards_of(c)
    assert {"expert_mlp", "loop over experts", "dense einsum, weighed first", "dense einsum", "transformers, eager"} <= set(forwards)
    for name, forward in forwards.items():
        for got, wanted in zip(forms.step(c, forward), expected, strict=False):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_wrong_form_is_found_before_it_is_timed(forms):
    c = forms.case(9, 16, 6, 8, 3, "cpu")
    right = forms.step(c, lambda: (forms.dense(c), c.leaves))
    wrong = forms.step(c, lambda: (forms.dense(c) * 1.01, c.leaves))
    forms.check_equal({"step over grouped_mm": right, "same": right}, 1e-4)
    with pytest.raises(AssertionError, match="output of slower"):
        forms.check_equal({"step over grouped_mm": right, "slower": wrong}, 1e-4)
    with pytest.raises(AssertionError, match="x of broken"):
        forms.check_equal({"step over grouped_mm": right, "broken": (right[0], right[1] * torch.nan, *right[2:])}, 1e-4)


def test_liger_is_called_with_its_own_layout(forms, monkeypatch):
    class LigerFusedMoEFunction:
        """As liger-kernel 0.8.5 documents it: x (T, H), gate over up (E, 2I, H), (E, H, I), int32 (T, K), (T, K)."""

        @staticmethod
        def apply(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            assert top_k_index.dtype == torch.int32
            return pair_by_pair(x, gate_up_proj, down_proj, top_k_index, top_k_weights)

    package = types.ModuleType("liger_kernel")
    package.ops = types.ModuleType("liger_kernel.ops")
    package.ops.LigerFusedMoEFunction = LigerFusedMoEFunction
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", package.ops)
    c = forms.case(9, 16, 6, 8, 3, "cpu")
    outputs = {name: forms.step(c, lambda form=form: (form(c), c.leaves)) for name, form in (("L", forms.liger), ("D", forms.dense_naive))}
    forms.check_equal({"step over grouped_mm": outputs["D"], "Liger": outputs["L"]}, 1e-5)
    assert forms.why_no_liger("cuda") is None
    assert forms.why_no_liger("cpu") == "runs on a GPU alone"


def test_a_missing_liger_is_named_with_the_remedy(forms, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert forms.why_no_liger("cuda").endswith("pip install --no-deps liger-kernel")


def test_memory_counts_what_a_call_holds_at_most_and_what_it_leaves(forms):
    def call() -> Tensor:
        passing = torch.ones(1000, 1000)
        return passing[0].clone()

    assert forms.allocated(call, "cpu") == (4_004_000, 4_000)


def test_memory_counts_results_that_no_allocation_event_tells_of(forms):
    buffer = bytearray(4_000_000)

    def call() -> tuple[Tensor, Tensor]:
        return torch.frombuffer(buffer, dtype=torch.float32), torch.ones(500)

    assert forms.allocated(call, "cpu") == (4_002_000, 4_002_000)


def cells_of(page: ModuleType, threshold: float, power: float) -> list:
    """Dense takes as long as ours where k/E = threshold * I^power, and half as long at twice that density."""
    cells = []
    for neurons in (8, 32):
        for slots in (1, 2, 4, 8, 16, 32, 64):
            ratio = threshold * neurons**power / (slots / 64)
            rows = {page.OURS: {"min": 2.0, "peak": 5.0}, page.DENSE: {"min": 2.0 * ratio, "peak": 5.0 * ratio}}
            cells.append(page.Cell(64, neurons, slots, rows))
    return cells


def test_a_planted_crossover_is_found(page):
    cells = cells_of(page, threshold=0.02, power=0.5)
    for (neurons, _), points in page.lines_of(cells, "min").items():
        found, low, high = page.crossover(points)
        assert found == pytest.approx(0.02 * neurons**0.5)
        assert (low, high) == (1 / 64, 1)
    rule = page.rule_of(cells, "peak")
    assert rule.factor == pytest.approx(0.02)
    assert rule.power == pytest.approx(0.5)
    assert (rule.right, rule.judged) == (14, 14)
    assert page._crossovers(cells)[2:] == ["| 64 of 8 neurons | 0.057 | 0.057 |", "| 64 of 32 neurons | 0.11 | 0.11 |"]
    density, least, most = page.safe_density(cells, "min")
    assert density == 2 / 64  # 0.0566 is where dense wins first, with 8 neurons
    assert least == pytest.approx(0.02 * 8**0.5 * 32)
    assert most == pytest.approx(0.02 * 32**0.5 * 64)


def test_no_crossover_is_claimed_where_none_was_measured(page):
    assert page.crossover([(0.1, 5.0), (0.5, 2.0), (1.0, 1.5)]) == (None, 0.1, 1.0)
    assert page.crossover([(0.1, 0.5), (0.5, 0.2)]) == (None, 0.1, 0.5)
    assert page._where([(0.1, 5.0), (0.5, 2.0), (1.0, 1.5)]) == "not up to 1"
    assert page._where([(0.1, 0.5), (0.5, 0.2)]) == "0.1 or less"
    one_size = [cell for cell in cells_of(page, 0.02, 0.5) if cell.neurons == 8]
    assert page.rule_of(one_size, "min") is None


def test_a_form_that_was_not_measured_stays_empty(page):
    rows = {page.OURS: {"min": 0.5, "peak": 2e6}}
    assert page._table([page.Cell(64, 8, 4, rows)], [("ours", page.OURS, "min"), ("dense", page.DENSE, "min")])[2:] == [
        "| 64 | 8 | 4 | 0.062 | 500 |  |"
    ]
    assert page.Cell(64, 8, 4, rows).ratio("min") is None


def test_the_sweep_writes_its_page_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["expert_dispatch.py", "--quick", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)])
    sweep = module("expert_dispatch")

    def run() -> str:
        sweep.main()
        return capsys.readouterr().out

    assert "64 experts of 8, 64 a token:" in run()
    results = tmp_path / "einsum_or_dispatch.json"
    content = json.loads(results.read_text())
    assert [cell["slots"] for cell in content["cells"]] == [1, 4, 64]
    text = (tmp_path / "einsum_or_dispatch.md").read_text()
    for cell in content["cells"]:
        milliseconds = cell["candidates"]["expert_mlp"]["min"] * 1e3
        shown = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
        assert f"| 64 | 8 | {cell['slots']} | {cell['slots'] / 64:.2g} | {shown} |" in text
    assert (tmp_path / "einsum_or_dispatch.png").stat().st_size > 10_000

    content["cells"] = content["cells"][:2]
    content["cells"][0]["candidates"]["expert_mlp"]["min"] = 12.345
    results.write_text(json.dumps(content))
    again = run()
    assert "64 experts of 8, 64 a token:" in again
    assert "64 experts of 8, 4 a token:" not in again
    assert json.loads(results.read_text())["cells"][0]["candidates"]["expert_mlp"]["min"] == 12.345


def test_a_peer_that_cannot_run_is_left_out_with_its_reason():
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this machine")

    candidates = {"ours": lambda: 1, "peer": lambda: 2, "broken": broken}
    found = measure("g", candidates, lambda out: {"peer": out["peer"] / 8}, rounds=2, optional=["broken"])
    assert list(found.samples) == ["ours", "peer"]
    assert found.info == {"left out": {"broken": "RuntimeError: no kernel for this machine"}, "error": {"peer": 0.25}}
    with pytest.raises(RuntimeError, match="no kernel"):
        measure("g", candidates, rounds=2)


def test_an_optional_peer_that_is_wrong_is_no_peer_left_out():
    def wrong() -> None:
        raise AssertionError("differs")

    with pytest.raises(AssertionError, match="differs"):
        measure("g", {"ours": lambda: 1, "peer": wrong}, rounds=1, optional=["peer"])


def test_notes_made_after_measuring_are_in_the_json(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    (tmp_path / "conftest.py").write_text((FOLDER / "conftest.py").read_text())
    (tmp_path / "bench_late.py").write_text(
        "def test_late(compare):\n"
        "    found = compare('g', {'ours': lambda: 1, 'peer': lambda: 2}, rounds=2, info={'goal': 'x'})\n"
        "    found.info['share of the copy'] = 0.91\n"
    )
    out = tmp_path / "out.json"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "bench_late.py", f"--benchmark-json={out}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # no benchmark is stored in a worker
    ran = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stdout
    rows = json.loads(out.read_text())["benchmarks"]
    assert [(row["name"], row["extra_info"]["share of the copy"], row["extra_info"]["goal"]) for row in rows] == [
        ("ours", 0.91, "x"), ("peer", 0.91, "x")
    ]  # fmt: skip


def test_the_curves_of_the_front_page_are_rows_of_the_measured_tables():
    """The page has the mean of four texts of prose, and that of four of code."""
    page = (FOLDER.parent / "docs/studies/selection.md").read_text(encoding="utf-8").partition("## Texts of")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 9 and row[0] != "arm"]
    measured = {(arm, float(blocks)): (float(prose) + float(code)) / 2 for arm, _, blocks, prose, code, *_ in rows}
    curves, tokens = module("readme_picture").read_curves(FOLDER.parent / "docs/studies/selection.json")
    drawn = {(arm, round(blocks, 2)): excess for arm, points in curves.items() for blocks, excess in points}
    assert len(drawn) == 12
    for point, excess in drawn.items():
        assert excess == pytest.approx(measured[point], abs=1e-4)
    assert f"{tokens:,} tokens" in page


def test_the_map_of_the_front_page_has_each_weights_mean_sps(tmp_path):
    layout = [
        LayoutEntry(f"model.layers.{layer}.mlp.{name}.weight", 128, 2, 4 * layer + 2 * number)
        for layer in range(2)
        for number, name in enumerate(("up", "down"))
    ]
    norms = np.ones((2, 8), np.float32)
    sps = np.array([3.0, 1, -2, -2, 0, 8, -5, 1])  # sums over the two tokens
    zeros = np.zeros(8)
    integral = Integral(sps, np.full(8, 2.0), zeros, zeros, zeros, zeros)
    with MscanWriter(tmp_path / "a.mscan", {"model": "m", "topic": "t"}, layout, mode="w") as writer:
        writer.append(SequenceRecord("s", np.array([1, 2]), np.zeros(2, np.float32), norms, norms, integral=integral))
    grid, modules, metadata, tokens = module("readme_picture").read_map(tmp_path / "a.mscan")
    assert (modules, metadata["topic"], tokens) == (["up", "down"], "t", 2)
    np.testing.assert_allclose(grid, [[1, -1], [2, -1]])


def test_rows_at_a_goal_have_their_prediction(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import predicted

    page = (FOLDER.parent / "docs" / "kernels.md").read_text()
    notes = predicted.predicted("dyn_nsa", (65536, 64, 4, 128), 90)["predicted ms, H100"]
    assert set(notes) == {"forward", "forward, lists as in text", "backward", "backward, lists as in text"}
    for part in ("forward", "backward"):
        first, second = notes[part], notes[f"{part}, lists as in text"]
        assert f"### dyn_nsa {part}, H100: {first:.2f} ms predicted; {second:.2f} ms with lists as in text" in page
    experts = predicted.predicted("expert_mlp", (16384, 1024, 1024, 64, 8), 90)["predicted ms, H100"]
    assert set(experts) == {"forward", "backward, with surprise"}
    assert predicted.predicted("dyn_nsa", (4096, 64, 4, 128), 90) == {}
    assert predicted.predicted("dyn_nsa", (65536, 64, 4, 128), 75) == {}
