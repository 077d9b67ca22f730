"""PerpetualStore: what is saved comes back bit for bit, only what changed is written, and damage is noticed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyonn.store import DamagedStoreError, Keep, PerpetualStore, StoreError, fork, read_life_log, rewind, verify
from tinyonn.store.life_log import LOG
from tinyonn.store.manifest import CHAPTER

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Small(nn.Module):
    """A linear layer, a pool of experts, a buffer, a tied weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.experts = nn.Parameter(torch.randn(16, 32, 32))
        self.num_experts = 16
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.inner.weight
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.narrow = nn.Parameter(torch.randn(4, 3).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(self.inner(x)).sum() + self.experts.square().mean() + self.narrow.float().sum()


def small(seed: int = 0, width: int = 8) -> tuple[Small, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Small(width)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.randn(2, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run, by names of our own."""
    found = {f"m.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"o.{name}.{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def lived(folder: Path, steps: int = 4, **options: Any) -> dict[int, dict[str, Tensor]]:
    """A store of some steps, and the tensors of each."""
    model, optimizer = small()
    found = {}
    with PerpetualStore(folder, model, optimizer, **({"keep": "all"} | options)) as store:
        store.restore()
        for step in range(1, steps + 1):
            train(model, optimizer)
            store.save(step, score=step % 3)
            found[step] = copied(model, optimizer)
    return found


# ---- what is saved comes back ----


def test_every_kept_step_comes_back_bit_for_bit(tmp_path: Path) -> None:
    expected = lived(tmp_path, 5)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.steps == [1, 2, 3, 4, 5]
        for step in (5, 1, 3, 2, 4):
            assert store.restore(step) == step
            assert_same(copied(model, optimizer), expected[step])
        assert store.restore() == 5
        assert_same(copied(model, optimizer), expected[5])


def test_state_before_the_first_step_of_the_optimiser_has_none(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.save(0)
        train(model, optimizer)
        store.save(1)
        assert optimizer.state
        store.restore(0)
        assert not optimizer.state
        store.restore(1)
        assert len(optimizer.state) == 4


def test_random_states_objects_groups_and_further_values_come_back(tmp_path: Path) -> None:
    class Loader:
        def __init__(self) -> None:
            self.place: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.place = state["place"]

    model, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loader = Loader()
    place = {"epoch": 2, "order": torch.tensor([3, 1, 2]), "pair": (1, 2.5, None), 7: ["x", True]}
    loader.place = place
    train(model, optimizer)
    scheduler.step()
    with PerpetualStore(tmp_path, model, optimizer, objects={"scheduler": scheduler, "loader": loader}) as store:
        store.save(1, state={"epoch": 0.1 + 0.2, "names": ["a", None]})
        store.wait()
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
        train(model, optimizer)
        scheduler.step()
        loader.place = None
        assert store.restore() == 1
        assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn  # noqa: NPY002
        assert store.random_restored
        assert store.state == {"epoch": 0.1 + 0.2, "names": ["a", None]}
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert scheduler.last_epoch == 1
    assert torch.equal(loader.place.pop("order"), place.pop("order"))
    assert loader.place == place


def test_a_run_that_goes_on_equals_one_that_did_not_stop(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer, 7)
    expected = copied(model, optimizer)
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        for step in range(1, 5):
            train(model, optimizer)
            store.save(step)
    model, optimizer = small(seed=5)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 4
        for step in range(5, 8):
            train(model, optimizer)
            store.save(step)
    assert_same(copied(model, optimizer), expected)


def test_saves_do_not_see_what_the_next_step_changes(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        train(model, optimizer)
        store.save(1)
        expected = copied(model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        store.restore(1)
    assert_same(copied(model, optimizer), expected)


# ---- only what changed is written ----


def test_only_changed_chunks_are_written(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1)
        with torch.no_grad():
            model.experts[3] += 1
        optimizer.state[model.experts]["exp_avg"][5] += 1
        store.save(2)
        store.save(3)
    first, second, third = (record["bytes"] for record in read_life_log(tmp_path / LOG).records if record["event"] == "save")
    assert first > 16 * 4096 * 3
    assert second < 2 * 4096 + 32768  # two slices, the JSON texts and the index
    assert third < 1024  # the index
    names = load_file(segments(tmp_path)[1]).keys()
    assert {name for name in names if not name.startswith("@")} == {"model.experts[03:04]", "optimizer.experts.exp_avg[05:06]"}
    assert len(segments(tmp_path)) == 2


def test_segments_are_safetensors_files_with_the_values(tmp_path: Path) -> None:
    expected = lived(tmp_path, 1)[1]
    found = load_file(segments(tmp_path)[0])
    rows = [found[f"model.experts[{row:02d}:{row + 1:02d}]"] for row in range(16)]
    assert torch.equal(torch.cat(rows), expected["m.experts"])
    assert torch.equal(found["optimizer.narrow.exp_avg"], expected["o.narrow.exp_avg"])
    assert ("model.head.weight" in found) != ("model.inner.weight" in found)  # a tied weight is stored once


def test_a_changed_byte_of_any_tensor_is_saved(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.save(1)
        step = 1
        for tensor in model.state_dict().values():
            if not tensor.numel():
                continue
            flat = tensor.reshape(-1).view(torch.uint8)
            for place in (0, len(flat) - 1):
                flat[place] ^= 1
                step += 1
                store.save(step)
                expected = copied(model, optimizer)
                flat[place] ^= 1
                store.restore(step)
                assert_same(copied(model, optimizer), expected)


# ---- which steps are kept ----


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("last:1", [20]),
        ("last:3", [18, 19, 20]),
        ("last:2,every:7", [7, 14, 19, 20]),
        ("last:1,best:2", [17, 20]),
        ("all", [*range(1, 21)]),
    ],
)
def test_keep(tmp_path: Path, keep: str, expected: list[int]) -> None:
    states = lived(tmp_path, 20, keep=keep)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep=keep) as store:
        assert store.steps == expected
        for compacted in (False, True):
            for step in expected:
                store.restore(step)
                assert_same(copied(model, optimizer), states[step])
            store.restore()
            if not compacted:
                store.compact()
                assert store.steps == expected
        with pytest.raises(StoreError, match="step must be a kept one"):
            store.restore(21)


@pytest.mark.parametrize("text", ["", "last", "last:0", "last:x", "best:-1", "last:1,last:2", "newest:3", 3])
def test_keep_rejects(text: Any) -> None:
    with pytest.raises(ValueError, match="keep"):
        Keep.parse(text)


# ---- chapters and compaction ----


def test_compaction_keeps_every_step_over_chapters(tmp_path: Path) -> None:
    steps = 2 * CHAPTER + 9
    model, optimizer = small()
    states = {}
    with PerpetualStore(tmp_path, model, optimizer, keep="last:4,every:10", auto_compact=False) as store:
        for step in range(1, steps + 1):
            train(model, optimizer)
            store.save(step)
            states[step] = copied(model, optimizer)
        kept = store.steps
        assert kept == sorted({*range(10, steps, 10), *range(steps - 3, steps + 1)})
        before = store.compact()
        assert before is not None
        assert before.bytes_after < before.bytes_before / 3
        assert before.files_after < 5
        again = store.compact()
        assert again is not None
        assert abs(again.bytes_after - before.bytes_after) < 2**16
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="last:4,every:10") as store:
        assert store.steps == kept
        for step in reversed(kept):
            store.restore(step)
            assert_same(copied(model, optimizer), states[step])
        store.restore()
        train(model, optimizer)
        store.save(steps + 1)
    assert verify(tmp_path).faults == []
    assert verify(tmp_path).readable == [*[step for step in kept if step % 10 == 0], *range(steps - 2, steps + 2)]


@pytest.mark.parametrize("compacted", [(), (4,), (4, 6), (4, 5, 6, 7, 8)], ids=str)
def test_other_tensors_after_a_compaction(tmp_path: Path, compacted: tuple[int, ...]) -> None:
    states = lived(tmp_path, 4)
    model, optimizer = small(seed=1)
    for begin in (4, 6):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9 * (begin == 6))
        with PerpetualStore(tmp_path, model, None, keep="all") as store:
            if begin in compacted:
                store.compact()
        with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
            store._restored = True  # another optimiser begins here
            for step in (begin + 1, begin + 2):
                train(model, optimizer)
                store.save(step)
                states[step] = copied(model, optimizer)
                if step in compacted:
                    store.compact()
            assert store.steps == list(range(1, begin + 3))
    found = verify(tmp_path)
    assert (found.faults, found.readable) == ([], list(range(1, 9)))
    from tinyonn.store.ledger import Ledger
    from tinyonn.store.manifest import Manifest
    from tinyonn.store.segment import Files

    ledger = Ledger(tmp_path, Manifest.read(tmp_path))
    for step, expected in states.items():
        layout, table = ledger.at(step)
        for tensor in ("inner.weight", "narrow"):
            data = bytes(Files(ledger.segments).checked(table[layout.numbers[f"model.{tensor}"]], tensor))
            assert data == expected[f"m.{tensor}"].reshape(-1).view(torch.uint8).numpy().tobytes(), step


def test_a_store_that_keeps_little_stays_small(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="last:1") as store:
        for step in range(1, 3 * CHAPTER + 3):
            train(model, optimizer)
            store.save(step)
        store.wait()
        whole = store.state_bytes()
    assert sum(path.stat().st_size for path in segments(tmp_path)) < (CHAPTER + 4) * 1.1 * whole


def test_training_goes_on_while_another_process_wants_a_compaction(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="last:1") as store:
        for step in range(1, 9):
            train(model, optimizer)
            if step == 6:
                store.wait()
                (tmp_path / "compact.request").touch()
            store.save(step)
        store.wait()
        assert not (tmp_path / "compact.request").exists()
        assert len(segments(tmp_path)) <= 3


# ---- rewind and fork ----


@pytest.mark.parametrize("compacted", [False, True], ids=["chain", "compacted"])
@pytest.mark.parametrize("target", [3, CHAPTER, CHAPTER + 2])
def test_rewind_forgets_later_steps(tmp_path: Path, target: int, compacted: bool) -> None:
    states = lived(tmp_path, CHAPTER + 5)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        if compacted:
            store.compact()
        with pytest.raises(StoreError, match="restore"):
            store.save(target + 1)
        assert store.restore(target) == target
        with pytest.raises(StoreError, match="restore"):
            store.save(target + 1)
        assert store.restore(target, rewind=True) == target
        assert_same(copied(model, optimizer), states[target])
        assert store.steps == list(range(1, target + 1))
        train(model, optimizer)
        store.save(target + 1)
        new = copied(model, optimizer)
        store.restore(2)
        assert_same(copied(model, optimizer), states[2])
        store.restore()
        assert_same(copied(model, optimizer), new)
    assert verify(tmp_path).faults == []


def test_forks_live_apart(tmp_path: Path) -> None:
    states = lived(tmp_path / "one", 5)
    child = fork(tmp_path / "one", tmp_path / "two", 3)
    assert child.parent is not None
    assert child.parent["step"] == 3
    shared = segments(tmp_path / "two")
    assert all(path.stat().st_nlink == 2 for path in shared)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path / "two", model, optimizer, keep="last:1") as store:
        assert store.life == child.life
        assert store.parent == child.parent
        assert store.restore() == 3
        assert_same(copied(model, optimizer), states[3])
        for step in range(4, 9):
            train(model, optimizer)
            store.save(step)
        store.compact()
        own = copied(model, optimizer)
    with PerpetualStore(tmp_path / "one", model, optimizer, keep="last:1") as store:
        assert store.life == child.parent["life"]
        store.restore()
        assert_same(copied(model, optimizer), states[5])
        store.save(6)
        store.compact()
    assert verify(tmp_path / "two").faults == []
    shutil.rmtree(tmp_path / "one")
    with PerpetualStore(tmp_path / "two", model, optimizer) as store:
        assert store.restore() == 8
        assert_same(copied(model, optimizer), own)
    events = [record["event"] for record in read_life_log(tmp_path / "two" / "parents" / f"{child.parent['life']}.jsonl").records]
    assert events.count("save") == 5


def test_fork_rejects(tmp_path: Path) -> None:
    lived(tmp_path / "one", 2)
    with pytest.raises(StoreError, match="new or empty folder"):
        fork(tmp_path / "one", tmp_path / "one")
    with pytest.raises(StoreError, match="kept one, 1, 2, got 9"):
        fork(tmp_path / "one", tmp_path / "two", 9)
    assert not (tmp_path / "two").exists()


# ---- the log ----


def test_the_log_tells_the_life(tmp_path: Path) -> None:
    lived(tmp_path, 3)
    rewind(tmp_path, 2)
    log = read_life_log(tmp_path / "life.jsonl")
    assert [(record["event"], record["step"]) for record in log.records] == [
        ("begin", 0), ("save", 1), ("save", 2), ("save", 3), ("restore", 2),
    ]  # fmt: skip
    assert [record["step"] for record in log.effective() if record["event"] == "save"] == [1, 2]
    assert log.records[0]["life"] == json.loads((tmp_path / "manifest.json").read_text().splitlines()[0])["life"]


# ---- bad input ----


def test_a_store_of_another_model_names_three_tensors(tmp_path: Path) -> None:
    lived(tmp_path, 2)
    model, optimizer = small(width=9)
    before = copied(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        with pytest.raises(StoreError, match=r"inner.weight, float32 \(8, 8\) in the store and float32 \(9, 9\) here; .*inner.bias.*head"):
            store.restore()
        assert_same(copied(model, optimizer), before)
        with pytest.raises(StoreError, match="restore"):
            store.save(3)
    other = nn.Linear(3, 3)
    with (
        PerpetualStore(tmp_path, other, torch.optim.AdamW(other.parameters())) as store,
        pytest.raises(StoreError, match=r"which this model does not have; .*; 6 more differ"),
    ):
        store.restore()


def test_two_trainers_on_one_store(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1)
        with pytest.raises(StoreError, match="no other run writes into"):
            PerpetualStore(tmp_path, model, optimizer)
        with pytest.raises(StoreError, match="no other run writes into"):
            rewind(tmp_path)
        store.save(2)
    PerpetualStore(tmp_path, model, optimizer).close()


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    from tinyonn.store.layout import digest, hex_digest

    lived(tmp_path, 1)
    line = (tmp_path / "manifest.json").read_text().splitlines()[0].replace('"format":1', '"format":2')
    (tmp_path / "manifest.json").write_text(f"{line}\n{hex_digest(digest(line.encode()))}\n")
    with pytest.raises(StoreError, match="has format 2, and this version of tinyonn reads 1; update tinyonn"):
        PerpetualStore(tmp_path, *small())


def test_steps_must_rise(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        store.save(5)
        with pytest.raises(StoreError, match="step must be above 5"):
            store.save(5)
        with pytest.raises(ValueError, match="step"):
            store.save(-1)


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        with pytest.raises(StoreError, match=r"state\.a\.b must be a tensor or a value that JSON can hold, got <object"):
            store.save(1, state={"a": {"b": object()}})
        store.save(1, state={"a": float("inf")})
        store.restore()
        assert store.state == {"a": float("inf")}


def test_a_full_disk_stops_with_the_last_step_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = lived(tmp_path, 2)
    model, optimizer = small(seed=1)
    store = PerpetualStore(tmp_path, model, optimizer)
    store.restore()
    train(model, optimizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))  # type: ignore[attr-defined]
    store.save(3)
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes for step 3, and the disk has 5,000. Step 2 is intact.") as caught:
        store.close()
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 2
        assert_same(copied(model, optimizer), states[2])
    assert verify(tmp_path).faults == []


def test_an_error_of_the_background_reaches_the_next_step(tmp_path: Path) -> None:
    model, optimizer = small()
    store = PerpetualStore(tmp_path, model, optimizer)
    store.save(1, wait=True)
    shutil.rmtree(tmp_path / "segments")
    train(model, optimizer)
    store.save(2)
    store._background._pool.submit(lambda: None).result()  # the save before it is done
    with pytest.raises(StoreError, match="cannot be written"):
        store.save(3)
    with pytest.raises(StoreError, match="cannot be written"):
        store.close()


# ---- damage ----


def flipped(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    lived(tmp_path / "store", CHAPTER + 3)
    for _ in range(2):  # deletes what an earlier chapter left
        with PerpetualStore(tmp_path / "store", *small(), keep="all") as store:
            store.restore()
            store.save(store.steps[-1] + 1)
    assert verify(tmp_path / "store").faults == []
    draw = random.Random(0)
    for path in files_of(tmp_path / "store"):
        if path.parent.name == "segments" and draw.random() < 0.9:
            continue
        whole = path.read_bytes()
        for place in {0, 9, len(whole) // 2, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(6))}:
            flipped(path, place, draw.randrange(8))
            found = verify(tmp_path / "store")
            assert found.faults, (path.name, place)
            assert any(path.name in fault for fault in found.faults), (path.name, place, found.faults)
            path.write_bytes(whole)
    assert verify(tmp_path / "store").faults == []


def test_a_damaged_segment_names_file_tensor_and_what_is_readable(tmp_path: Path) -> None:
    states = lived(tmp_path, 3)
    newest = segments(tmp_path)[-1]
    size = newest.stat().st_size
    flipped(newest, size - 5, 0)
    found = verify(tmp_path)
    assert found.readable == [1, 2]
    assert found.lost == [3]
    model, optimizer = small(seed=1)
    before = copied(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        with pytest.raises(DamagedStoreError, match=rf"{newest.name}: \S+ is damaged. Step 2 is whole: `tinyonn life restore .* --step 2`"):
            store.restore()
        assert_same({name: one for name, one in copied(model, optimizer).items() if name.startswith("m.")}, before)
    assert rewind(tmp_path, 2) == 2
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 2
        assert_same(copied(model, optimizer), states[2])
    assert verify(tmp_path).faults == []


@pytest.mark.parametrize("what", ["manifest", "segment"])
def test_truncation_at_every_byte_is_noticed_and_the_step_before_stays(tmp_path: Path, what: str) -> None:
    source = tmp_path / "source"
    model, optimizer = nn.Linear(2, 2), None
    with PerpetualStore(source, model, optimizer, keep="all") as store:
        for step in (1, 2, 3):
            with torch.no_grad():
                model.weight.fill_(step)
            store.save(step)
    path = source / "manifest.json" if what == "manifest" else segments(source)[-1]
    whole = path.read_bytes()
    previous = (source / "manifest.previous.json").read_bytes()
    stride = 1 if what == "manifest" else max(1, len(whole) // 400)
    for length in [*range(0, len(whole), stride), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError) as caught, PerpetualStore(source, model) as store:
            store.restore()
        assert path.name in str(caught.value)
        assert "--step 2" in str(caught.value), length
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert rewind(copy, 2) == 2
    with PerpetualStore(copy, model) as store:
        assert store.restore() == 2
    assert float(model.weight.detach()[0, 0]) == 2
    path.write_bytes(whole)
    (source / "manifest.previous.json").write_bytes(previous)
    with PerpetualStore(source, model) as store:
        assert store.restore() == 3


def test_opening_deletes_what_a_killed_save_left(tmp_path: Path) -> None:
    lived(tmp_path, 2)
    (tmp_path / "segments" / "00000099.safetensors").write_bytes(b"half")
    (tmp_path / "index" / "table-00000099.npy").write_bytes(b"half")
    with PerpetualStore(tmp_path, *small()) as store:
        assert store.restore() == 2
    assert len(segments(tmp_path)) == 2
    assert verify(tmp_path).faults == []


# ---- what goes wrong within a call ----


def test_an_interrupt_within_a_save_does_not_count_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1, wait=True)
        train(model, optimizer)
        with monkeypatch.context() as patched:

            def interrupted(*args: Any) -> None:
                raise KeyboardInterrupt

            patched.setattr(store._background, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.save(2)
        store.save(3)
        expected = copied(model, optimizer)
        train(model, optimizer)
        assert store.restore() == 3
        assert_same(copied(model, optimizer), expected)


def test_rewind_to_a_step_that_cannot_be_read_keeps_the_later_ones(tmp_path: Path) -> None:
    states = lived(tmp_path, 3)
    flipped(segments(tmp_path)[1], segments(tmp_path)[1].stat().st_size - 5, 0)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        with pytest.raises(DamagedStoreError, match="Step 1 is whole"):
            store.restore(2, rewind=True)
        with pytest.raises(DamagedStoreError):
            store.rewind(2)
        assert store.steps == [1, 2, 3]
        with pytest.raises(StoreError, match="restore"):
            store.save(4)
    other = nn.Linear(3, 3)
    with PerpetualStore(tmp_path, other) as store:
        with pytest.raises(StoreError):
            store.restore(1, rewind=True)
        assert store.steps == [1, 2, 3]
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        assert store.restore(1, rewind=True) == 1
        assert_same(copied(model, optimizer), states[1])
        store.save(2)


def test_a_compaction_that_finds_no_room_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyonn.store import perpetual_store

    def no_room(*args: Any) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(perpetual_store, "compact", no_room)
    model, optimizer = small()
    store = PerpetualStore(tmp_path, model, optimizer, keep="last:1")
    for step in range(1, CHAPTER + 3):
        train(model, optimizer)
        store.save(step)
    with pytest.warns(UserWarning, match="the store was not compacted: no room"):
        store.close()
    assert any("no room" in record.get("failed", "") for record in read_life_log(tmp_path / "life.jsonl").records)
    monkeypatch.undo()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == CHAPTER + 2


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        store.close()
        with pytest.raises(StoreError, match="the store must be open"):
            store.save(1)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        with pytest.raises(StoreError, match="only tensor of that name"):
            store.save(1, state={"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}})
        store.save(1, state={"a": torch.ones(2)})
        store.restore()
        assert torch.equal(store.state["a"], torch.ones(2))


def test_only_restore_takes_the_manifest_before(tmp_path: Path) -> None:
    from tinyonn.store.overview import newest_step
    from tinyonn.store.rewinding import editing

    lived(tmp_path, 3)
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-4])
    with pytest.raises(DamagedStoreError), editing(tmp_path):
        pass
    manifest.unlink()
    with pytest.raises(StoreError, match="brings back the one before it"):
        newest_step(tmp_path)
    assert rewind(tmp_path) == 2
    assert newest_step(tmp_path) == 2


def test_a_damaged_list_of_files_deletes_nothing(tmp_path: Path) -> None:
    lived(tmp_path, CHAPTER + 3)
    before = segments(tmp_path)
    for path in (tmp_path / "index").glob("files-*.npy"):
        flipped(path, path.stat().st_size - 1, 0)
    with pytest.raises(DamagedStoreError, match=r"files-\d+.npy is damaged"):
        PerpetualStore(tmp_path, *small())
    assert segments(tmp_path) == before


def test_other_files_in_the_folders_are_left_alone(tmp_path: Path) -> None:
    lived(tmp_path, 2)
    (tmp_path / "segments" / ".notes").mkdir()
    (tmp_path / "segments" / "readme.txt").write_text("mine")
    with PerpetualStore(tmp_path, *small()) as store:
        store.restore()
        store.compact()
    assert (tmp_path / "segments" / "readme.txt").read_text() == "mine"


@pytest.mark.parametrize("existed", [False, True])
def test_a_fork_that_fails_leaves_nothing(tmp_path: Path, existed: bool) -> None:
    lived(tmp_path / "one", 3)
    segments(tmp_path / "one")[-1].unlink()
    if existed:
        (tmp_path / "two").mkdir()
    with pytest.raises(StoreError, match=r"00000003.safetensors"):
        fork(tmp_path / "one", tmp_path / "two", 3)
    assert (tmp_path / "two").exists() == existed
    assert fork(tmp_path / "one", tmp_path / "two", 2).kept == [2]


def test_a_fork_that_was_killed_says_what_to_do(tmp_path: Path) -> None:
    lived(tmp_path / "one", 3)
    fork(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    with pytest.raises(StoreError, match="if a fork was interrupted, remove the folder and fork again"):
        PerpetualStore(tmp_path / "two", *small())


def test_wrappers_whose_state_is_a_copy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"model must be sharded by fully_shard .* got DataParallel"):
        PerpetualStore(tmp_path, nn.DataParallel(nn.Linear(2, 2)))
