"""`tinyonn train` through its command: what it writes, going on after a stop, bad input, and its page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl

from tinyonn.errors import InputError
from tinyonn.life import LifeConfig, fork_life, train, training
from tinyonn.life.running import StopSignals
from tinyonn.store import read_life_log, rewind, verify
from tinyonn.store.overview import newest_step

SMALL = {
    "hidden_size": 32, "head_dim": 16, "init_num_experts": 6, "max_num_experts": 8, "vocab_size": 300, "context": 16, "batch_size": 4,
    "eval_size": 4, "eval_steps": 4, "log_steps": 2, "save_steps": 1, "keep": "last:2", "steps": 8, "device": "cpu", "attention": "full",
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "small", "model", "reads", "a", "short", "text", "and", "learns", "the", "next", "word", "of", "it"]
    generator = np.random.default_rng(0)
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(" ".join(generator.choice(words, 120)))
    return folder


def config(texts: Path, folder: Path, **options: Any) -> LifeConfig:
    return LifeConfig(**(SMALL | {"data_path": str(texts), "output_dir": str(folder)} | options))


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A life of eight steps, without a stop."""
    told: list[tuple[float | None, str]] = []
    result = train(config(texts, tmp_path_factory.mktemp("whole") / "life"), lambda share, words: told.append((share, words)))
    return result, told


def test_a_life_leaves_a_model_a_log_and_a_page(whole):
    result, told = whole
    assert (result.steps, result.stopped, result.skipped) == (8, None, 0)
    model = AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert type(model).__name__ == "TinyOnnForCausalLM"
    assert len(tokenizer) == model.config.vocab_size <= 300
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters
    lines = [json.loads(line) for line in (result.folder / "log" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert {"pi", "tau", "surprise", "routing_accuracy", "live_experts", "experts_per_token"} <= training[-1].keys()
    assert result.metrics["loss"] == training[-1]["loss"]
    assert training[-1]["loss"] < training[0]["loss"]
    choices = [json.loads(line) for line in (result.folder / "log" / "choices.jsonl").read_text().splitlines()]
    assert len(choices) == 4 * 3
    total = sum(sum(line["counts"]) for line in choices if line["layer"] == "model.layers.0.experts")
    snapshot = json.loads((result.folder / "log" / "experts.json").read_text())["layers"]["model.layers.0.experts"]
    assert sum(snapshot["activations"]) == total
    assert sum(snapshot["live"]) == 6
    assert [share for share, words in told if words.startswith("step")] == [0.25, 0.5, 0.75, 1.0]


def test_the_page_works_offline_and_shows_each_part(whole):
    result, _ = whole
    page = result.page.read_text()
    for title in (
        "Core metrics",
        "Experts",
        "Choices over time",
        "Sample",
        "Predictive integrity",
        "Routing accuracy",
        "Births and recyclings",
    ):
        assert title in page
    assert "connect-src" in page or "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)http", page)
    assert (result.folder / "core.png").read_bytes().startswith(b"\x89PNG")
    assert (result.folder / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_the_scalars_of_the_log(whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, _ = whole
    (folder,) = {path.parent for path in (result.folder / "log").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = [json.loads(line) for line in (result.folder / "log" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "pi", "tau", "surprise", "routing_accuracy", "experts_per_token", "live_experts", "births"):
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/{name}")]
        wanted = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines if name in line]
        assert found == wanted
        assert len(found) == 4
    assert len(events.Scalars("eval/loss")) == 2


def test_a_life_that_stopped_goes_on_to_the_same_end(texts, whole, tmp_path):
    result, _ = whole
    train(config(texts, tmp_path / "life", steps=4))
    again = train(config(texts, tmp_path / "life", steps=8))
    assert again.steps == 8
    lines = [json.loads(line)["step"] for line in (again.folder / "log" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)
    assert (again.folder / "log" / "choices.jsonl").read_text() == (result.folder / "log" / "choices.jsonl").read_text()
    whole_model, parts = (AutoModelForCausalLM.from_pretrained(one.model).state_dict() for one in (result, again))
    for name in whole_model:
        assert torch.equal(whole_model[name], parts[name]), name
    assert again.metrics["loss"] == result.metrics["loss"]


def test_a_life_that_has_its_steps_is_left_alone(texts, tmp_path):
    train(config(texts, tmp_path / "life", steps=2))
    weights = (tmp_path / "life" / "model" / "model.safetensors").read_bytes()
    for steps in (2, 1):
        again = train(config(texts, tmp_path / "life", steps=steps))
        assert again.steps == 2
        assert again.stopped == "an earlier run did these steps"
    assert (tmp_path / "life" / "model" / "model.safetensors").read_bytes() == weights


def test_a_life_that_was_killed_goes_on_to_the_same_end(texts, whole, tmp_path):
    """SIGKILL at three moments; the same command goes on each time."""
    result, _ = whole
    folder = tmp_path / "life"
    run = [sys.executable, "-m", "tinyonn", "train", "-d", str(texts), "-o", str(folder), *typed(SMALL)]
    for step in (1, 3, 6):
        child = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while (newest_step(folder / "store") or 0) < step:
            assert time.monotonic() < end
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.005)
        child.kill()
        child.communicate()
    again = train(config(texts, folder))
    assert again.steps == 8
    for name, value in AutoModelForCausalLM.from_pretrained(result.model).state_dict().items():
        assert torch.equal(value, AutoModelForCausalLM.from_pretrained(again.model).state_dict()[name]), name
    assert verify(folder / "store").faults == []
    records = read_life_log(folder / "store" / "life.jsonl").effective()
    assert [record["event"] for record in records].count("stretch") == 4
    assert [record["step"] for record in records if record["event"] == "metrics"] == [2, 4, 6, 8]
    saved = [record["step"] for record in records if record["event"] == "save"]
    restored = {record["step"] for record in records if record["event"] == "restore"}
    assert saved == sorted(set(saved))
    assert {*saved, *restored} == set(range(1, 9))  # a kill between the manifest and the record of it leaves the record out
    assert records[-1]["event"] == "stop"
    assert records[-1]["reason"] == "all steps were done"
    stretch = next(record for record in records if record["event"] == "stretch")
    assert stretch["data"] == str(texts)
    assert len(stretch["data_hash"]) == 64
    assert stretch["versions"]["torch"] == torch.__version__
    assert stretch["options"]["learning_rate"] == 1e-3


def test_a_life_goes_on_from_the_step_to_which_it_was_restored(texts, whole, tmp_path):
    folder = tmp_path / "life"
    train(config(texts, folder, keep="all"))
    rewind(folder / "store", 3)
    again = train(config(texts, folder))
    expected = AutoModelForCausalLM.from_pretrained(whole[0].model).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(again.model).state_dict().items():
        assert torch.equal(value, expected[name]), name
    lines = [json.loads(line)["step"] for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)


def test_a_life_killed_before_its_model_was_written_trains_no_further(texts, whole, tmp_path):
    folder = tmp_path / "life"
    train(config(texts, folder, steps=8))
    shutil.rmtree(folder / "model")
    again = train(config(texts, folder, steps=8))
    assert (again.steps, newest_step(folder / "store")) == (8, 8)
    expected = AutoModelForCausalLM.from_pretrained(whole[0].model).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(again.model).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_model_is_that_of_the_newest_step(texts, tmp_path):
    folder = tmp_path / "life"
    first = train(config(texts, folder, steps=2, keep="all"))
    expected = (first.model / "model.safetensors").read_bytes()
    later = train(config(texts, folder, steps=4, keep="all"))
    assert (later.model / "model.safetensors").read_bytes() != expected
    rewind(folder / "store", 2)
    again = train(config(texts, folder, steps=2, keep="all"))
    assert (again.steps, newest_step(folder / "store")) == (2, 2)
    assert (again.model / "model.safetensors").read_bytes() == expected


def test_the_size_of_the_state_is_told_before_the_first_step(texts, tmp_path):
    told: list[str] = []
    log = tmp_path / "life" / "store" / "life.jsonl"

    def note(line: str) -> None:
        told.append(line)
        assert not any(record["event"] == "save" for record in read_life_log(log).records)

    train(config(texts, tmp_path / "life", steps=1), None, note)
    (found,) = re.findall(
        r"^store: the first save writes the whole state, at most about ([\d.]+) kB, and later saves only what changes; .* are free", told[0]
    )
    (save,) = [record for record in read_life_log(log).records if record["event"] == "save"]
    assert float(found) * 1000 == pytest.approx(save["bytes"], rel=0.15)
    train(config(texts, tmp_path / "life", steps=2), None, told.append)
    assert re.match(rf"store: the whole state is at most about {found} kB, and a save writes only what changes; ", told[2])
    assert told[1] == "going on from step 1, up to step 2"


def test_its_own_files_are_no_texts(texts, tmp_path):
    for file in texts.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    inside = train(config(tmp_path, tmp_path / "life", steps=1))
    outside = train(config(texts, tmp_path.parent / "outside", steps=1))
    assert np.array_equal(np.load(inside.folder / "tokens.npy"), np.load(outside.folder / "tokens.npy"))


def test_damaged_files_are_one_line_and_a_vocabulary_is_kept(texts, tmp_path):
    folder = tmp_path / "life"
    train(config(texts, folder, steps=2))
    before = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:50])
    fork_life(folder, tmp_path / "fork")
    for of, options in ((folder, {}), (tmp_path / "fork", {"learning_rate": 5e-4})):
        with pytest.raises(InputError, match=r"tokens\.npy must be whole; remove it to read the texts again"):
            train(config(texts, of, steps=4, **options))
    (folder / "tokens.npy").unlink()
    assert train(config(texts, folder, steps=4)).steps == 4
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == before
    (folder / "options.yaml").unlink()
    with pytest.raises(InputError, match=r"output_dir must have the options\.yaml of its life"):
        train(config(texts, folder, steps=6))


def test_other_options_in_the_same_folder_are_refused(texts, tmp_path):
    train(config(texts, tmp_path / "life", steps=2))
    with pytest.raises(
        InputError, match=r"context must be 16, as in the life in .*life, got 32: give that, or fork the life with `tinyonn life fork"
    ):
        train(config(texts, tmp_path / "life", context=32))
    assert train(config(texts, tmp_path / "life", steps=4, log_steps=1)).steps == 4


def test_experts_that_are_not_live_move_only_without_freeze_idle(texts, tmp_path):
    """Both runs draw the same weights; only weight decay moves experts that are not live."""
    models = []
    for freeze in (True, False):
        result = train(config(texts, tmp_path / str(freeze), steps=2, weight_decay=0.5, freeze_idle=freeze))
        models.append(AutoModelForCausalLM.from_pretrained(result.model))
    frozen, moved = (model.model.layers[0].experts.down_proj.detach() for model in models)
    torch.testing.assert_close(frozen[6:] * (1 - 1e-3 * 0.5) ** 2, moved[6:])
    assert not torch.equal(frozen[6:], moved[6:])
    with pytest.raises(InputError, match="freeze_idle must be False, as in the life in "):
        train(config(texts, tmp_path / "False", steps=4))


def test_a_life_that_is_older_than_an_option_goes_on_as_it_began(texts, tmp_path):
    train(config(texts, tmp_path, steps=1, freeze_idle=False))
    file = tmp_path / "options.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("freeze_idle")))
    with pytest.raises(InputError, match=r"freeze_idle must be False, as in the life in .*, got True"):
        train(config(texts, tmp_path, steps=2))
    assert train(config(texts, tmp_path, steps=2, freeze_idle=False)).steps == 2


def test_an_error_leaves_the_handlers_of_signals_as_they_were(texts, tmp_path):
    def fail(share: float | None, words: str) -> None:
        if share is not None:
            raise ValueError("in the first step")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="in the first step"):
        train(config(texts, tmp_path, log_steps=1), fail)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_two_trainers_in_one_folder(texts, tmp_path):
    folder = tmp_path / "life"
    code = "import sys, time; from tinyonn._io.locks import locked\nwith locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="output_dir must be a folder that no other run is writing into"):
            train(config(texts, folder))
    finally:
        holder.kill()
        holder.wait()


def typed(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "tinyonn", "train", *map(str, arguments), *typed(options)]
    return subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_reads_a_file_of_options_and_prints_how_it_ended(texts, tmp_path):
    file = tmp_path / "life.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"data-path": str(texts), "steps": 99}))
    done = command("--config", file, steps=2, output_dir=tmp_path / "life")
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^trained +2 steps, [\d,]+ parameters$", done.stdout)
    assert re.search(r"(?m)^page +.*life\.html$", done.stdout)
    assert "{" not in done.stdout
    assert "FutureWarning" not in done.stderr
    printed = subprocess.run(
        [sys.executable, "-m", "tinyonn", "train", "--print-config"], capture_output=True, text=True, check=True
    ).stdout
    assert set(yaml.safe_load(printed)) == set(LifeConfig.__dataclass_fields__)
    assert all("#" in line for line in printed.splitlines() if re.match(r"\w+:", line))


def test_a_signal_saves_and_the_same_command_goes_on(texts, tmp_path):
    folder = tmp_path / "life"
    given = typed(SMALL | {"steps": 100_000, "log_steps": 1})
    run = [sys.executable, "-m", "tinyonn", "train", "-d", str(texts), "-o", str(folder), *given]
    child = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = folder / "log" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < end
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0
    assert "\nSIGTERM: training stops and saves after this step; a second signal stops it at once\n" in err
    assert re.search(r"(?m)^stopped +SIGTERM; run the same command to go on$", out)
    stop = read_life_log(folder / "store" / "life.jsonl").records[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "SIGTERM")
    steps = int(re.search(r"trained +([\d,]+) step", out)[1].replace(",", ""))
    result = train(config(texts, folder, steps=steps + 2, log_steps=1))
    assert result.steps == steps + 2
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 3))


@pytest.mark.filterwarnings("ignore:.*process group")
def test_a_signal_while_processes_agree_counts_in_the_next_step(tmp_path, monkeypatch):
    signals, control, arguments = StopSignals(), TrainerControl(), SimpleNamespace(device="cpu")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        all_reduce = distributed.all_reduce
        with signals, monkeypatch.context() as patched:
            patched.setattr(distributed, "all_reduce", lambda *args: (all_reduce(*args), os.kill(os.getpid(), signal.SIGTERM)))
            signals.on_step_end(arguments, None, control)
        assert not control.should_training_stop  # other processes do not know of it yet
        signals.on_step_end(arguments, None, control)
        assert control.should_training_stop
        assert control.should_save
        assert signals.asked == "SIGTERM"
    finally:
        distributed.destroy_process_group()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such path": ({"data_path": "/none"}, "data_path must be a file or a folder, got /none, which does not exist"),
    "head_dim": ({"head_dim": 15}, "head_dim must be even"),
    "experts": ({"init_num_experts": 9}, "init_num_experts must be at most max_num_experts 8, got 9"),
    "gamma": ({"gamma": 1.5}, "gamma must be at least 0 and at most 1"),
    "attention": ({"attention": "dyn_nsaa"}, "attention must be one of dyn_nsa, dyn_smha, full, got 'dyn_nsaa'; did you mean 'dyn_nsa'?"),
    "weights": ({"drive_weights": True}, "drive_weights must be false where w_ce and w_kl are 0, got true"),
    "sharded on a CPU": ({"fsdp": True}, "fsdp must be false on a CPU, where Accelerate does not shard a model; got true."),
    "little text": ({"context": 2000}, "data_path must have more than 8,000 tokens"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_one_line(options, message, texts, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)) as found:
        train(config(texts, tmp_path / "life", **options))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "life" / "tokens.npy").exists()


def test_an_unknown_option_names_the_nearest(tmp_path):
    file = tmp_path / "life.yaml"
    file.write_text("data_path: x\ngroth_threshold: 0.1\n")
    done = command("--config", file)
    assert done.returncode == 2
    assert "did you mean 'growth_threshold'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_empty_folder_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data_path must have a text, got .*empty, which has none"):
        train(config(tmp_path / "empty", tmp_path / "life"))


def test_two_processes_train_one_life(texts, tmp_path):
    """Each of two processes takes two rows of a batch of four; the first writes."""
    folder = tmp_path / "life"
    given = typed(SMALL | {"batch_size": 2})
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tinyonn", "train"]
    done = subprocess.run([*run, "-d", str(texts), "-o", str(folder), *given], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained") == 1
    lines = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]


@pytest.mark.parametrize(("given", "live", "most"), [({}, 28, 32), ({"init_num_experts": 6}, 6, 32), ({"max_num_experts": 16}, 14, 16)])
def test_room_for_births_is_that_of_the_size_unless_both_are_given(given, live, most, texts, tmp_path):
    sizes = SMALL | {"init_num_experts": None, "max_num_experts": None, "steps": 1} | given
    result = train(LifeConfig(**(sizes | {"data_path": str(texts), "output_dir": str(tmp_path)})))
    config = json.loads((result.model / "config.json").read_text())
    assert (config["init_num_experts"], config["max_num_experts"]) == (live, most)


def test_only_the_first_process_reads_all_tokens(texts, whole, monkeypatch):
    files = []
    monkeypatch.setattr(training, "digest", lambda file: files.append(file) or "ab" * 32)
    assert train(config(texts, whole[0].folder)).first
    assert files == [whole[0].folder / "tokens.npy"]
    monkeypatch.setenv("RANK", "1")
    assert not train(config(texts, whole[0].folder)).first
    assert len(files) == 1
