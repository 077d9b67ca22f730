"""A scan that was stopped goes on and ends as if it had not been; outputs that must not be touched are refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import MscanReader, MscanWriter
from tinyonn.scan import OutputCompleteError, OutputDiffersError, ScanConfig, ScanEngine, ScanInterrupted, run_scan
from tinyonn.scan import runner as runner_module

TEXTS = [f"text {i}: " + "word " * (i * 7 % 12 + 1) for i in range(30)]


@pytest.fixture
def config(tmp_path, tiny_model, write_corpus):
    corpus = write_corpus(TEXTS)
    return ScanConfig(str(tiny_model), str(corpus), output_path=str(tmp_path / "out.mscan"), batch_size=3)


@pytest.fixture
def whole(config, contents, tmp_path):
    """What an uninterrupted scan stores."""
    path = tmp_path / "whole.mscan"
    run_scan(dataclasses.replace(config, output_path=str(path)))
    return contents(path)


def stop_after(batches: int, error: BaseException):
    """A progress callback that raises after so many batches."""
    seen = iter(range(batches + 1))  # loading, scanning, then one a batch

    def progress(state):
        if next(seen, None) is None:
            raise error

    return progress


def killed_after(appended: int, config: ScanConfig) -> None:
    append, left = MscanWriter.append, [appended]

    def append_or_die(self, record):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return append(self, record)

    MscanWriter.append = append_or_die
    run_scan(config)


@pytest.mark.parametrize("appended", [0, 10])
def test_a_killed_scan_goes_on_and_ends_the_same(config, whole, contents, appended, forked):
    killed = forked(lambda: killed_after(appended, config))
    killed.join(240)
    assert killed.exitcode == -signal.SIGKILL
    with MscanReader(config.output) as reader:
        assert len(reader.sequences) == appended
    result = run_scan(config)
    assert (result.resumed, result.sequences) == (appended, len(TEXTS) - appended)
    assert contents(config.output) == whole
    with MscanReader(config.output, recovery="strict") as reader:
        assert len(reader.sequences) == len(TEXTS)


@pytest.mark.parametrize("size", [0, 6, 64, 1024])
def test_a_file_cut_in_its_first_write_counts_as_not_begun(config, whole, contents, size):
    run_scan(dataclasses.replace(config, limit=3))
    start = config.output.read_bytes()
    assert int.from_bytes(start[40:48], "little") > size  # the first chunk
    config.output.write_bytes(start[:size])
    assert run_scan(config).resumed == 0
    assert contents(config.output) == whole


def test_ctrl_c_leaves_a_closed_file_and_says_how_to_go_on(config, whole, contents):
    with pytest.raises(
        ScanInterrupted, match=r"out\.mscan is closed and readable, with 6 sequences of this run; the same command continues"
    ):
        run_scan(config, progress=stop_after(2, KeyboardInterrupt()))
    with MscanReader(config.output, recovery="strict") as reader:
        assert len(reader.sequences) == 6
    assert run_scan(config).resumed == 6
    assert contents(config.output) == whole


def test_ctrl_c_in_a_real_process_ends_it_with_a_strictly_valid_file(config):
    code = "import sys\nfrom tinyonn.scan import *\n"
    code += "run_scan(ScanConfig(*sys.argv[1:3], output_path=sys.argv[3], batch_size=1), progress=print)"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, config.model_path, config.dataset_path, config.output_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a suite in the background ignores it
    )
    for line in process.stdout:
        if "done=4" in line:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert "ScanInterrupted" in errors
    with MscanReader(config.output, recovery="strict") as reader:
        assert 4 <= len(reader.sequences) < len(TEXTS)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=["gpu", "python", "torch-cpu"],
)
def test_running_out_of_memory_names_the_options_and_keeps_what_is_there(config, whole, contents, monkeypatch, error):
    scan, left = ScanEngine.scan, [4]

    def scan_or_fail(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return scan(self, *args)

    monkeypatch.setattr(ScanEngine, "scan", scan_or_fail)
    with pytest.raises(InputError, match="memory ran out after 12 sequences") as raised:
        run_scan(config)
    assert all(option in str(raised.value) for option in ("--batch-size", "--max-length", "--dtype", "--store"))
    monkeypatch.undo()
    # As the message advises; other batches, so the same values up to rounding.
    result = run_scan(dataclasses.replace(config, batch_size=1))
    assert (result.resumed, result.sequences) == (12, 18)
    assert contents(config.output).keys() == whole.keys()


def test_another_runtime_error_is_not_dressed_up(config, monkeypatch):
    monkeypatch.setattr(ScanEngine, "scan", lambda self, *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_scan(config)


def test_a_larger_limit_goes_on_from_a_smaller(config, contents, whole):
    run_scan(dataclasses.replace(config, limit=10))
    assert run_scan(config).resumed == 10
    assert contents(config.output).keys() == whole.keys()


def test_another_configuration_is_refused_with_the_fields_that_differ(config, contents):
    run_scan(dataclasses.replace(config, limit=3))
    before = config.output.read_bytes()
    with pytest.raises(OutputDiffersError, match=r"differs in credit \(full → local\), max_length \(128 → 20\); use --overwrite"):
        run_scan(dataclasses.replace(config, credit="local", max_length=20))
    assert config.output.read_bytes() == before


def test_another_corpus_or_model_is_refused(config, write_corpus, tmp_path):
    from tinyonn.testing import save_tiny_model

    run_scan(dataclasses.replace(config, limit=3))
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(OutputDiffersError, match="differs in model_weights_sha256;"):
        run_scan(dataclasses.replace(config, model_path=str(other)))
    folder = shutil.copytree(config.model_path, tmp_path / "same")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(OutputDiffersError, match="differs in tokenizer_sha256;"):
        run_scan(dataclasses.replace(config, model_path=str(folder)))
    write_corpus([*TEXTS, "one more"])
    with pytest.raises(OutputDiffersError, match="differs in corpus_sha256;"):
        run_scan(config)


def test_a_complete_output_says_so_before_the_model_is_loaded(config, monkeypatch):
    run_scan(config)
    monkeypatch.setattr(runner_module, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(OutputCompleteError, match="complete with 30 sequences; use --overwrite"):
        run_scan(config)


def test_a_scan_whose_rest_is_too_short_is_complete(tmp_path, tiny_model, write_corpus):
    config = ScanConfig(str(tiny_model), str(write_corpus(["hello", "x"])), output_path=str(tmp_path / "o.mscan"))
    run_scan(config)
    with pytest.raises(OutputCompleteError, match="complete with 1 sequences"):
        run_scan(config)


def test_overwrite_replaces_and_resume_off_refuses(config, contents, whole):
    run_scan(dataclasses.replace(config, limit=3, credit="local"))
    with pytest.raises(InputError, match=r"output_path must not exist when resuming is off, got .*out.mscan"):
        run_scan(dataclasses.replace(config, resume=False))
    result = run_scan(dataclasses.replace(config, overwrite=True))
    assert result.resumed == 0
    assert contents(config.output) == whole


def test_overwrite_keeps_the_old_file_until_the_new_scan_can_start(config, tmp_path):
    run_scan(dataclasses.replace(config, limit=3))
    before = config.output.read_bytes()
    with pytest.raises(InputError, match="model_path must be an existing folder or a hub id"):
        run_scan(dataclasses.replace(config, overwrite=True, model_path=str(tmp_path / "nowhere")))
    assert config.output.read_bytes() == before


def test_an_unwritable_output_fails_before_anything_is_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "prepare", lambda *args: pytest.fail("the corpus was read"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_path must be writable, got .*: (Not a directory|File exists)"):
        run_scan(dataclasses.replace(config, output_path=str(tmp_path / "file" / "o.mscan")))
    (tmp_path / "folder.mscan").mkdir()
    with pytest.raises(InputError, match=r"output_path must be writable, got .*: Is a directory"):
        run_scan(dataclasses.replace(config, output_path=str(tmp_path / "folder.mscan")))


def test_the_corpus_is_never_the_output(config, write_corpus):
    corpus = write_corpus(TEXTS, "corpus.mscan")
    before = corpus.read_bytes()
    with pytest.raises(InputError, match=r"output_path must be another file than dataset_path, got .*corpus\.mscan"):
        run_scan(dataclasses.replace(config, dataset_path=str(corpus), output_path=str(corpus), overwrite=True))
    assert corpus.read_bytes() == before


def test_an_output_that_is_no_file_fails_before_anything_is_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "prepare", lambda *args: pytest.fail("the corpus was read"))
    os.mkfifo(config.output)
    with pytest.raises(InputError, match=r"output_path must be a file, got a pipe or device: .*out\.mscan"):
        run_scan(config)
    config.output.unlink()
    config.output.symlink_to(tmp_path / "nowhere" / "o.mscan")
    with pytest.raises(InputError, match=r"output_path must be a file, got a broken link: .*out\.mscan"):
        run_scan(dataclasses.replace(config, overwrite=True))


def test_a_damaged_output_is_named_and_kept(config):
    run_scan(config)
    damaged = bytearray(config.output.read_bytes())
    damaged[70] ^= 0xFF
    config.output.write_bytes(damaged)
    with pytest.raises(MscanError, match=r"out\.mscan"):
        run_scan(config)
    assert config.output.read_bytes() == bytes(damaged)


def test_a_second_scan_into_the_same_file_is_refused(config, whole, contents):
    def start_another(state):
        if state.done == 6:
            with pytest.raises(MscanError, match=r"out\.mscan"):
                run_scan(config)
            with pytest.raises(InputError, match=r"output_path must be no file that another process is writing, got .*out\.mscan"):
                run_scan(dataclasses.replace(config, overwrite=True))
            seen.append(state)

    seen: list[object] = []
    run_scan(config, progress=start_another)
    assert len(seen) == 1
    assert contents(config.output) == whole


def test_the_model_is_released_from_the_engine_after_an_interrupt(config, monkeypatch):
    models = []
    load = runner_module.load_model
    monkeypatch.setattr(runner_module, "load_model", lambda *args: models.append(load(*args)) or models[-1])
    with pytest.raises(ScanInterrupted):
        run_scan(config, progress=stop_after(1, KeyboardInterrupt()))
    assert not any(module._forward_hooks for module in models[0].modules())
    assert all(parameter.requires_grad for parameter in models[0].parameters())
