"""The kernel report: machine code read loop by loop, and the work of a launch against a count by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from tinyonn.testing.sass import read

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")

SASS = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R29], desc[UR8][R10.64], P1 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR12], RZ, !UPT ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   LDG.E R4, desc[UR8][R2.64] ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00b0*/               @P2 BRA `(.L_x_2) ;
        /*00c0*/                   NOP;
.L_x_2:
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_machine_code_is_read_loop_by_loop():
    assembly = read(SASS)
    outer, inner = assembly.loops
    assert (outer.depth, inner.depth) == (1, 2)
    assert outer.opcodes == ("LDGSTS.E.BYPASS.128", "BAR.SYNC.DEFER_BLOCKING", "LDG.E", "BRA")
    assert len(inner) == 4
    assert dict(inner.matrix) == {"wgmma 64x32x16": 1, "mma.sync 16x8x16": 1}
    assert inner.flops(8) == 2 * (2 * 64 * 32 * 16) + 8 * (2 * 16 * 8 * 16)  # two warpgroups, eight warps
    assert (outer.barriers, inner.barriers, assembly.outside.barriers) == (1, 1, 0)
    assert dict(assembly.loads) == {"LDG 128": 1, "cp.async 128": 1, "LDG 32": 1, "TMA": 1}
    assert "NOP" not in assembly.outside.opcodes


@pytest.fixture(scope="module")
def work() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        import kernel_work

        yield kernel_work
    finally:
        sys.path.remove(str(FOLDER))


def launch_of(work: ModuleType, name: str, grid: tuple[int, ...], tensors: dict[str, tuple[int, ...]], **numbers: object) -> object:
    arguments = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in tensors.items()}
    build = SimpleNamespace(kernel=SimpleNamespace(__name__=f"_{name}_kernel"), grid=grid, arguments=arguments | numbers)
    return work.Launch(build)


@pytest.mark.parametrize("compressed", [False, True], ids=["window", "compressed"])
def test_work_of_attention_to_intervals_is_counted_by_hand(work, compressed):
    tokens, group, heads, dim, before, reach, rows, keys = 150, 3, 2, 32, 14, 6 if compressed else 40, 32, 8
    tiles = -(-tokens * group // rows)
    sizes = {"num_rows": tokens * group, "GROUP": group, "before": before, "reach": reach, "COMPRESSED": compressed, "HEAD_DIM": dim}
    own = {name: (1, tokens, group * heads, dim) for name in ("q_ptr", "out_ptr")} | {"lse_ptr": (1, tokens, group * heads)}
    own |= {name: (1, tokens + before, heads, dim) for name in ("k_ptr", "v_ptr")}
    one = launch_of(work, "interval_fwd", (tiles, heads), own, ROWS=rows, KEYS=keys, WIDTH=dim, ACCUMULATE=False, **sizes)
    found = work.interval_fwd(one)

    def seen(token: int) -> range:
        place = token + before
        return range((place + 1) // reach) if compressed else range(max(0, place - reach + 1), place + 1)

    pairs = sum(len(seen(token)) for token in range(tokens)) * group * heads
    assert found.needed == 2 * 2 * pairs * dim
    whole = masked = 0
    for tile in range(tiles):
        of_rows = [seen(min(row, tokens * group - 1) // group) for row in range(tile * rows, (tile + 1) * rows)]
        of_rows = [set(one_row) for one_row in of_rows if one_row]
        every = set().union(*of_rows)
        for begin in range(min(every, default=0), max(every, default=-1) + 1, keys):
            by_all = all(set(range(begin, begin + keys)) <= one_row for one_row in of_rows)
            whole, masked = whole + by_all, masked + (not by_all)
    assert whole >= 20
    assert found.steps == (whole * heads, masked * heads)
    assert found.tile == (2 * 2 * rows * keys * dim,) * 2


def test_work_of_listed_blocks_shares_the_forced_ones_alone(work):
    tokens, group, heads, dim, slots, queries = 40, 16, 2, 64, 7, 4
    own = {"q_ptr": (1, tokens, group * heads, dim), "out_ptr": (1, tokens, group * heads, dim), "lse_ptr": (1, tokens, group * heads)}
    own |= {name: (1, tokens, heads, dim) for name in ("k_ptr", "v_ptr")} | dict.fromkeys(
        ("blocks_ptr", "bias_ptr"), (1, tokens, heads, slots)
    )
    sizes = {"num_queries": tokens, "num_slots": slots, "GROUP": group, "HEAD_DIM": dim, "BLOCK_SIZE": 64, "QUERIES": queries}
    one = launch_of(work, "block_sparse_fwd", (tokens // queries, heads), own, KEYS=32, ROWS=64, WIDTH=dim, HAS_SUM=False, **sizes)
    found = work.block_sparse_fwd(one)
    assert found.needed == 2 * 2 * tokens * group * heads * slots * 64 * dim
    assert found.steps == (tokens // queries * heads * (3 + queries * (slots - 3)) * 2,)


def test_report_of_the_statistics(tmp_path):
    """Through the command: attention_stats computes each product once, and needs what a causal triangle has."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [
        sys.executable,
        str(FOLDER / "kernel_report.py"),
        "--op",
        "statistics",
        "--processes",
        "2",
        "--json",
        str(tmp_path / "x.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "x.json").read_text())["kernels"]}
    assert set(rows) == {"block_norms", "token_grad_norms", "integrate_sps", "attention_stats"}
    stats = rows["attention_stats"]
    assert stats["gflop"] == pytest.approx(2 * 8192 * 8193 / 2 * 32 * 128 / 1e9)
    assert stats["duplicated"] == 1
    assert 1 <= stats["masked"] < 1.05
    assert stats["spilled"] == 0
    assert stats["bound_ms"] < stats["predicted_ms"]
    assert "| attention_stats | 1 | ROWS 128, KEYS 64" in done.stdout
    done = subprocess.run([*command[:3], "nothing"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "--op must be the beginning of one of dyn_nsa forward" in done.stderr


def test_the_page_is_of_these_kernels(tmp_path):
    """And a page of others is found."""
    import triton

    written = json.loads((ROOT / "docs" / "kernels.json").read_text())["triton"]
    if triton.__version__ != written:
        pytest.skip(f"docs/kernels.json is of triton {written}, here is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")

    def check(folder: Path) -> subprocess.CompletedProcess[str]:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        command = [sys.executable, str(folder / "kernel_report.py"), "--check"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = check(FOLDER)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "docs").mkdir()
    shutil.copytree(FOLDER, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "studies", "__pycache__"))
    rows = json.loads((ROOT / "docs" / "kernels.json").read_text())
    rows["kernels"][3]["source"] = "another"
    (tmp_path / "docs" / "kernels.json").write_text(json.dumps(rows))
    done = check(tmp_path / "benchmarks")
    assert done.returncode == 3
    assert f"docs/kernels.json is out of date for {rows['kernels'][3]['kernel']}; run `make kernels`" in done.stderr


def test_lists_of_text_are_shorter_together(work):
    tokens, slots, queries = 40, 7, 4
    sizes = {"num_queries": tokens, "num_slots": slots, "GROUP": 16, "HEAD_DIM": 64, "BLOCK_SIZE": 64, "QUERIES": queries}
    one = launch_of(work, "block_sparse_fwd", (tokens // queries, 2), {}, KEYS=64, ROWS=64, WIDTH=64, HAS_SUM=False, **sizes)
    assert work._listed(one)[0] == tokens // queries * 2 * (3 + queries * (slots - 3))
    with work.lists_of_text():
        assert work._listed(one)[0] == pytest.approx(tokens // queries * 2 * 0.3 * queries * slots)
    assert work._listed(one)[0] == tokens // queries * 2 * (3 + queries * (slots - 3))


def test_the_union_of_lists_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from list_overlap import union_and_sum

    indices = torch.tensor([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 9]]]).repeat_interleave(64, 0)  # (256, 1, 2): rows 128 … 191 list 0 and 2
    counts = torch.tensor([2, 2, 2, 1])[:, None].repeat_interleave(64, 0)
    assert union_and_sum(indices, counts, 4) == (16 * 2 + 16 * 1, 64 * 2 + 64)
