"""`benchmarks/gpu.py` on a CPU, at tiny sizes: that every question runs, and that nothing which goes wrong stops the others."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu itself runs there"),
]

BAD = """
import os, sys, time

def fails(compare):
    compare("measured before", {"ours": lambda: 1, "peer": lambda: 2})
    raise RuntimeError("CUDA error: an illegal memory access\\nwas encountered")

def hangs(compare):
    compare("measured before", {"ours": lambda: 1})
    time.sleep(600)

def is_wrong(report):
    report["errors"] = {"case": {"output": 0.7}}
    assert False, "output must be right, got 0.7."

def dies():
    print("a word on the way out", flush=True)
    os.abort()

def late_notes(compare):
    found = compare("speed", {"ours": lambda: 1, "peer": lambda: 2}, info={"bytes": 12})
    found.info["share of the copy"] = 0.91
"""


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("OUT", raising=False)
    return import_module("gpu")


def run(gpu: ModuleType, output: Path, questions: list[Any], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = gpu.main(["--device", "cpu", "--jobs", "1", "--output", str(output), *arguments], questions)
    files = (output / "cpu-tiny-sizes" / "questions").glob("*.json")
    return code, {record["name"]: record for record in map(json.loads, (file.read_text() for file in files))}


def named(gpu: ModuleType, *names: str) -> list[Any]:
    found = {question.name: question for question in gpu.QUESTIONS}
    return [found[name] for name in names]


def test_whatever_goes_wrong_is_recorded_and_the_next_question_runs(gpu, tmp_path, monkeypatch, capsys):
    bad, tests = tmp_path / "bad.py", tmp_path / "test_one.py"
    bad.write_text(BAD)
    tests.write_text("def test_good():\n    pass\n\n\ndef test_broken():\n    assert 1 == 2, 'one is not two'\n")
    copies = tmp_path / "copies"
    monkeypatch.setenv("OUT", str(copies))

    def injected(name: str, stage: str, **options: Any) -> Any:
        return gpu.Question(name, stage, 1, f"{bad}:{name}", {}, {}, **options)

    oracle, goal = named(gpu, "oracle block_norms, float32", "block norms, bfloat16")
    by_tests = {"files": [str(tests)], "marker": "not slow"}
    questions = [
        injected("fails", "oracle"), injected("is_wrong", "oracle"), injected("hangs", "oracle", limit=3.0), oracle,
        injected("dies", "goal"), goal, injected("late_notes", "rest"),
        gpu.Question("tests", "rest", 1, "benchmarks/gpu_worker.py:run_tests", by_tests, {}),
        gpu.Question("absent", "rest", 1, f"{bad}:absent", {}, {}), gpu.Question("not here", "rest", 1, f"{bad}:absent"),
    ]  # fmt: skip
    code, records = run(gpu, tmp_path, questions)
    assert code == 1
    found = {name: (record["status"], record.get("reason")) for name, record in records.items()}
    assert found["fails"] == ("failed", "RuntimeError: CUDA error: an illegal memory access was encountered")
    assert found["is_wrong"] == ("wrong", "AssertionError: output must be right, got 0.7.")
    assert found["hangs"] == ("timeout", "no answer within 3 s")
    assert found["dies"][0] == "crashed"
    assert found["dies"][1].startswith("the process ended (SIGABRT): ")
    assert found["tests"][0] == "wrong"
    assert "1 failed, 1 passed" in found["tests"][1]
    assert "test_broken" in found["tests"][1]
    assert found["absent"][0] == "failed"
    assert found["not here"] == ("skipped", "needs a CUDA device")
    for name in (oracle.name, goal.name, "late_notes"):
        assert found[name] == ("ok", None)

    assert records["is_wrong"]["errors"] == {"case": {"output": 0.7}}
    for name in ("fails", "hangs"):  # what was measured until then
        assert [measured["group"] for measured in records[name]["comparisons"]] == ["measured before"]
    (speed,) = records["late_notes"]["comparisons"]
    assert speed["info"] == {"bytes": 12, "share of the copy": 0.91}
    assert set(speed["median_ms"]) == {"ours", "peer"}
    assert set(speed["times_the_subject"]) == {"peer"}
    (norms,) = records[goal.name]["comparisons"]
    assert norms["info"]["share of copy's bandwidth"] > 0
    assert norms["info"]["error"]["tinyonn"] < 1e-5
    errors = records[oracle.name]["errors"]["rows 5, features 100"]
    assert 0 < errors["gradient of x"] < 1e-6
    assert records[oracle.name]["shapes"] == {"rows 5, features 100": {"x": [5, 100], "row_scale": [5]}}
    for record in records.values():
        assert torch.__version__.startswith(record["machine"]["versions"]["torch"])
        assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", record["commit"])
        assert re.fullmatch(r"[0-9a-f]{16}", record["sources"])

    order = re.findall(r"^ +\d+ s  \w+ +[\d.]+ s  ([^:]+):", capsys.readouterr().out, re.MULTILINE)
    assert order == [question.name for question in questions]
    for file in (copies / "cpu-tiny-sizes.json", tmp_path / "cpu-tiny-sizes" / "all.json"):
        assert {record["name"] for record in json.loads(file.read_text())["questions"]} == set(records)
    assert "wrong       " in (copies / "cpu-tiny-sizes.txt").read_text()
    assert not list(tmp_path.rglob("*.part"))

    again = [replace(question, limit=1.0) for question in questions if question.name in (oracle.name, goal.name, "is_wrong")]
    run(gpu, tmp_path, again, "--resume")
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+ s  ", line)] == ["wrong"]


def test_time_is_kept_and_what_does_not_fit_is_named(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["gpu_runs"], "TINY_SECONDS", 2.0)
    go = gpu.Run.go

    def late(run: Any, *args: Any) -> None:
        """The first worker has started, however long that took; three seconds are left."""
        assert run.end - run.start == pytest.approx(180)
        run.end = time.monotonic() + 3
        go(run, *args)

    monkeypatch.setattr(gpu.Run, "go", late)
    (tmp_path / "slow.py").write_text("import time\n\n\ndef waits():\n    time.sleep(600)\n")
    waits = gpu.Question("waits", "goal", 1, f"{tmp_path}/slow.py:waits", {}, {})
    code, records = run(gpu, tmp_path, [waits, *named(gpu, "block norms, float32")], "--minutes", "3")
    assert code == 1
    assert records["waits"]["status"] == "timeout"
    assert records["block norms, float32"]["status"] == "skipped"
    assert re.fullmatch(r"no time: about 2 s are needed, [01] s are left", records["block norms, float32"]["reason"])


def test_oracles_that_took_too_long_come_after_the_goals(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["gpu_runs"], "ORACLE_SHARE", 0.0)
    names = ["block norms, float32", "oracle block_norms, float32"]
    code, _ = run(gpu, tmp_path, named(gpu, *reversed(names)))
    assert code == 0
    assert re.findall(r"^ +\d+ s  ok +[\d.]+ s  ([^:]+):", capsys.readouterr().out, re.MULTILINE) == names


def test_a_dry_run_lists_the_order_and_starts_nothing(gpu, tmp_path, capsys):
    assert gpu.main(["--dry-run", "--only", "mixture|dyn_nsa 64k", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r" +40 s  goal +dyn_nsa 64k, 64 over 4 heads, random$", lines[0])
    assert [line.split(":")[0] for line in lines[-3:]] == ["oracle", "goal", "rest"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "("], "argument --only: must be a regular expression, got '('"),
        (["--minutes", "0"], "argument --minutes: must be greater than 0, got 0."),
        (["--jobs", "-1"], "argument --jobs: must be at least 1, got -1."),
        (["--only", "no such question"], "--only 'no such question' matches no question"),
    ],
)
def test_wrong_arguments_are_named(gpu, arguments, says, capsys):
    try:
        code = gpu.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("place", ["--output", "$OUT"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(gpu, tmp_path, monkeypatch, capsys, place):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(gpu, "Run", None)
    output = tmp_path / "results"
    if place == "--output":
        output = tmp_path / "file"
    else:
        monkeypatch.setenv("OUT", str(tmp_path / "file"))
    assert gpu.main(["--device", "cpu", "--output", str(output)]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"gpu.py: {place} must be a folder that files can be written to, got {tmp_path / 'file'}: ")
    assert found.count("\n") == 1


def test_control_c_ends_the_questions_at_hand_and_keeps_what_was_answered(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\n\ndef answers():\n    pass\n\ndef hangs():\n    time.sleep(600)\n")
    script = f"""
import sys
sys.argv = ["gpu.py"]
sys.path.insert(0, {str(FOLDER)!r})
import gpu
questions = [gpu.Question(name, "oracle", 1, {str(slow)!r} + ":" + name, {{}}, {{}}, limit=500) for name in ("answers", "hangs")]
raise SystemExit(gpu.main(["--device", "cpu", "--jobs", "1", "--output", {str(tmp_path)!r}, "--minutes", "60"], questions))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a suite in the background ignores it
    )
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()) and "answers" not in line:
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "gpu.py: interrupted; --resume goes on with what is not answered yet."
    assert "Traceback" not in err
    assert "1 ok\n" in out
    assert [path.name for path in (tmp_path / "cpu-tiny-sizes" / "questions").iterdir()] == ["answers.json"]


def test_questions_come_in_stages_and_have_names_of_their_own(gpu):
    runs = sys.modules["gpu_runs"]
    stages = [question.stage for question in gpu.QUESTIONS]
    assert stages == sorted(stages, key=gpu.STAGES.index)
    assert len({runs.slug(question.name) for question in gpu.QUESTIONS}) == len(gpu.QUESTIONS)
    for question in gpu.QUESTIONS:
        file, name = question.target.split(":")
        functions = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        (function,) = [node for node in functions if node.name == name]
        taken = {argument.arg for argument in function.args.args + function.args.kwonlyargs}
        given = set(question.arguments) | set(question.tiny or {})
        assert given <= taken, question.name
        optional = {argument.arg for argument in function.args.args[len(function.args.args) - len(function.args.defaults) :]}
        assert taken - given - optional <= {"compare", "device", "report", "peak_megabytes", "marker"}, question.name


def test_every_file_with_gpu_tests_is_asked(gpu):
    marked = {file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").rglob("test_*.py")
              if re.search(r"^(pytestmark = |@)pytest\.mark\.gpu$", file.read_text(), re.MULTILINE)}  # fmt: skip
    assert marked == set(sys.modules["gpu_questions"].GPU_TESTS)


def test_peers_are_named(gpu):
    present, *absent = gpu.describe({"transformers": "5.23.0", "liger-kernel": None})
    assert present == "transformers 5.23.0: mixtures of experts, grouped_mm"
    assert absent[1] == "liger-kernel is not installed, so it is not measured against: mixtures of experts, fused"


def tree(target: Path) -> Path:
    """The files of the checkout that git knows or would take, without anything built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and the checkout")
@pytest.mark.parametrize(
    "only",
    [
        "^oracle (block_norms, float|token_grad_norms, b)|^block norms, b",
        pytest.param("^build|block_lists|^mixture 16k, best", marks=pytest.mark.slow),
    ],
    ids=["kernels", "build"],
)
def test_the_tree_alone_is_enough(tmp_path, only):
    """Nothing is built, pytest-benchmark is not installed, git is not there."""
    root = tree(tmp_path / "tree")
    assert not list((root / "tinyonn").glob("_C*.so"))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "pytest_benchmark.py").write_text("raise ModuleNotFoundError('pytest_benchmark is not installed')\n")
    given = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHONPATH", "TRITON_INTERPRET")}
    ran = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--only", only, "--jobs", "1"],
        cwd=root, env={**given, "PYTHONPATH": str(tmp_path / "without")}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    content = json.loads((root / "benchmarks" / "results" / "cpu-tiny-sizes" / "all.json").read_text())
    assert content["commit"] == "unknown"
    assert len(content["questions"]) == 3
    for record in content["questions"]:
        assert record["status"] == ("skipped" if "block_lists" in record["name"] else "ok"), record
    assert bool(list((root / "tinyonn").glob("_C*.so"))) == ("build" in only)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_question_runs_at_tiny_sizes(gpu, tmp_path):
    """All of them, and every configuration of every kernel with several was forced."""
    code, records = run(gpu, tmp_path, gpu.QUESTIONS, "--minutes", "18", "--jobs", "2")
    assert set(records) == {question.name for question in gpu.QUESTIONS}
    assert {name: record.get("reason") for name, record in records.items() if record["status"] not in ("ok", "skipped")} == {}
    assert code == 0
    assert {record["reason"] for record in records.values() if record["status"] == "skipped"} == {"needs a CUDA device"}
    kernels = tuned_kernels()
    for half in ("bfloat16", "float32"):
        forced = {name for record in records.values() if record["name"].endswith(half) for name in record.get("configurations", {})}
        assert forced == kernels, half


def tuned_kernels() -> set[str]:
    folder = ROOT / "kernels"
    names = (".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py"))
    modules = [import_module(name) for name in names if not name.endswith("__init__")]
    return {kernel.base_fn.__name__ for module in modules for kernel in vars(module).values() if hasattr(kernel, "caches")}


def test_candidates_that_do_not_fit_leave_the_others(gpu, monkeypatch, capsys, tmp_path):
    candidates = import_module("gpu_candidates")
    assert set(candidates.CANDIDATES) == set(candidates.OP) == set(candidates.kernels())
    kernel = candidates.kernels()["select_dk"]
    constants = {"IEEE": False, "WIDTH": 128, "QUERIES": 4, "RATIO": 1}
    own = kernel.offered(constants, 90)
    with candidates.offered({"select_dk": candidates.CANDIDATES["select_dk"][2:3]}):
        assert kernel.offered(constants, 90) == candidates.CANDIDATES["select_dk"][2:3]
    assert list(map(str, kernel.offered(constants, 90))) == list(map(str, own))

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: object) -> Any:
            return type("Done", (), {"result": lambda self: None})()

    def times(name: str, tiles: Any, sizes: dict[str, Any]) -> dict[str, float]:
        if tiles.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return {"dyn_nsa forward": 1.5}

    monkeypatch.setattr(candidates, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(candidates, "times", times)
    monkeypatch.setattr(candidates, "CANDIDATES", {name: candidates.CANDIDATES[name] for name in ("select_dk", "interval_fwd")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert candidates.main(["--output", str(tmp_path / "found.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(map(len, candidates.CANDIDATES.values()))
    assert sum("RuntimeError: out of resource" in line for line in lines) >= 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"gpu", "select_dk", "interval_fwd"}
    assert {"dyn_nsa forward": 1.5} in found["interval_fwd"].values()
