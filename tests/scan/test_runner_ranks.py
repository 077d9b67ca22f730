"""Several processes share a corpus; their files open as one, and any number of processes may go on with them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial

import pytest

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import MscanReader
from tinyonn.scan import OutputCompleteError, OutputDiffersError, ScanConfig, run_scan
from tinyonn.scan.distributed import World

TEXTS = [f"text {i}: " + "word " * (i * 5 % 9 + 1) for i in range(23)]


@pytest.fixture
def config(tmp_path, tiny_model, write_corpus):
    # Batches of one: a sequence's bits then do not depend on how the corpus was shared out.
    return ScanConfig(str(tiny_model), str(write_corpus(TEXTS)), output_path=str(tmp_path / "out.mscan"), batch_size=1)


@pytest.fixture
def whole(config, contents, tmp_path):
    path = tmp_path / "whole.mscan"
    run_scan(dataclasses.replace(config, output_path=str(path)))
    return contents(path)


@pytest.fixture
def run_as(monkeypatch):
    """`run_as(rank, size, config, stop_after=None)`: one process of several, in this one."""

    def run(rank, size, config, stop_after=None):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        left = [2 + stop_after if stop_after is not None else -1]

        def progress(state):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        try:
            return run_scan(config, progress=progress)
        except KeyboardInterrupt:
            return None
        finally:
            monkeypatch.delenv("RANK")
            monkeypatch.delenv("WORLD_SIZE")

    return run


def names(config):
    return sorted(path.name for path in config.output.parent.glob("out*.mscan"))


def test_torchrun_writes_a_file_a_process_that_opens_as_one(config, whole, contents, tmp_path):
    code = "import sys\nfrom tinyonn.scan import *\nprint(run_scan(ScanConfig(*sys.argv[1:3], output_path=sys.argv[3], batch_size=1)))"
    script = tmp_path / "scan_it.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script), config.model_path, config.dataset_path, config.output_path]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert names(config) == ["out.rank0-of-2.mscan", "out.rank1-of-2.mscan"]
    assert contents(config.output) == whole
    with MscanReader(config.output.with_name("out.rank1-of-2.mscan"), whole_set=False) as reader:
        assert sorted(sequence.sequence_id for sequence in reader.sequences) == sorted(f"t{i}" for i in range(1, 23, 2))


def test_two_processes_at_once_by_environment(config, whole, contents, forked):
    def scan(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        run_scan(config)

    processes = [forked(partial(scan, rank)) for rank in range(2)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(config.output) == whole


@pytest.mark.parametrize(("first", "then"), [(2, 2), (1, 2), (2, 1), (2, 3), (3, 2), (4, 1)], ids=lambda size: str(size))
def test_any_number_of_processes_goes_on_with_a_set(config, whole, contents, run_as, first, then):
    for rank in range(first):
        run_as(rank, first, config, stop_after=2)
    size = max(first, then)
    results = [run_as(rank, then, config) for rank in range(then)]
    assert sum(result.sequences for result in results) == len(TEXTS) - 2 * first
    assert sum(result.resumed for result in results) == 2 * first
    assert names(config) == (["out.mscan"] if size == 1 else [f"out.rank{i}-of-{size}.mscan" for i in range(size)])
    assert contents(config.output) == whole


def test_sizes_that_change_back_and_forth_scan_nothing_twice(config, whole, contents, run_as):
    for size in (2, 3, 1, 2):
        for rank in range(size):
            run_as(rank, size, config, stop_after=1)
    for rank in range(2):
        run_as(rank, 2, config)
    assert contents(config.output) == whole


def test_a_member_that_was_never_begun_is_made_up_for(config, whole, contents, run_as):
    run_as(0, 3, config, stop_after=2)  # processes 1 and 2 never started
    with pytest.raises(MscanError, match=r"out\.rank1-of-3\.mscan is missing"):
        MscanReader(config.output)
    run_scan(config)
    assert contents(config.output) == whole
    assert len(names(config)) == 3


def test_a_set_is_complete_only_as_a_whole(config, run_as):
    run_as(0, 2, config)
    result = run_as(0, 2, config)  # this process is done, the corpus is not
    assert (result.sequences, result.resumed) == (0, 12)
    run_as(1, 2, config)
    with pytest.raises(OutputCompleteError):
        run_as(1, 2, config)


def test_a_set_of_another_configuration_is_refused(config, run_as):
    run_as(1, 2, config, stop_after=1)
    with pytest.raises(OutputDiffersError, match=r"out\.rank1-of-2\.mscan differs in credit"):
        run_as(0, 2, dataclasses.replace(config, credit="local"))


def test_two_files_for_one_process_are_refused(config, run_as):
    run_as(0, 2, config, stop_after=1)
    (config.output.with_name("out.rank0-of-3.mscan")).write_bytes(config.output.with_name("out.rank0-of-2.mscan").read_bytes())
    with pytest.raises(InputError, match=r"one file for each process, got out\.rank0-of-2\.mscan and out\.rank0-of-3\.mscan; remove one"):
        run_as(1, 2, config)


def test_a_member_copied_over_another_is_not_gone_on_with(config, run_as):
    for rank in range(2):
        run_as(rank, 2, config, stop_after=1)
    files = [config.output.with_name(f"out.rank{rank}-of-2.mscan") for rank in range(2)]
    files[1].write_bytes(files[0].read_bytes())
    before = files[1].read_bytes()
    with pytest.raises(InputError, match=r"must be a set whose files hold different sequences, got '.*' in .*out\.rank1-of-2\.mscan"):
        run_as(1, 2, config)
    assert files[1].read_bytes() == before


def test_overwrite_leaves_no_member_of_an_older_set(config, whole, contents, run_as):
    for rank in range(3):
        run_as(rank, 3, config)
    for rank in range(2):
        run_as(rank, 2, dataclasses.replace(config, overwrite=True))
    assert names(config) == ["out.rank0-of-2.mscan", "out.rank1-of-2.mscan"]
    assert contents(config.output) == whole


def test_more_processes_than_texts_leave_empty_members(config, contents, run_as):
    # The third starts when all is scanned, and still owes the set its member.
    few = dataclasses.replace(config, limit=2)
    assert [run_as(rank, 3, few).sequences for rank in range(3)] == [1, 1, 0]
    assert contents(config.output).keys() == {"t0", "t1"}


def test_a_complete_set_is_left_as_it_is_by_another_number_of_processes(config, run_as):
    run_scan(config)
    for rank in range(2):
        with pytest.raises(OutputCompleteError):
            run_as(rank, 2, config)
    assert names(config) == ["out.mscan"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE, got 2 of 2."),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number, got 'x'."),
        ({"RANK": "²", "WORLD_SIZE": "5"}, "RANK must be a whole number, got '²'."),
        ({"WORLD_SIZE": "2"}, "RANK must be given where WORLD_SIZE is, got WORLD_SIZE 2 alone."),
        ({"WORLD_SIZE": "0"}, "RANK must be below WORLD_SIZE, got 0 of 0."),
    ],
)
def test_a_senseless_environment_is_refused(environment, message):
    with pytest.raises(InputError) as raised:
        World.from_environment(environment)
    assert str(raised.value) == message


def test_shares_are_disjoint_and_cover():
    shares = [list(World(rank, 3).share(range(10))) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert World.from_environment({}) == World(0, 1, 0)
    assert World.from_environment({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(1, 4, 1)
