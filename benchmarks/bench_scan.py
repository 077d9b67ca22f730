"""Cost of a scan against the forward and backward passes that it observes.

The scan runs `ScanEngine` and writes both planes to `.mscan`. The peer runs one forward and backward of the same summed loss on the same
frozen model and batches, without hooks or storage. Times are compared in one process, interleaved. Peak memory is compared between whole
runs in separate processes: `run_scan`, loading included, against loading, tokenising and the peer's loop.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.errors import InputError
from tinyonn.mscan import MscanWriter, SequenceRecord
from tinyonn.scan import ScanEngine

BATCH, LENGTH, BATCHES = 4, 128, 3

WHOLE_SCAN = """
import resource, sys
from tinyonn.scan import ScanConfig, run_scan
batch, length = int(sys.argv[4]), int(sys.argv[5])
run_scan(ScanConfig(sys.argv[1], sys.argv[2], output_path=sys.argv[3], batch_size=batch, max_length=length, credit=sys.argv[7]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
WHOLE_PEER = """
import resource, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tinyonn.scan import read_corpus
sys.path.insert(0, sys.argv[6])
from bench_scan import forward_backward
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval().requires_grad_(False)
batch, length = int(sys.argv[4]), int(sys.argv[5])
ids = [tokenizer(item.text, truncation=True, max_length=length)["input_ids"] for item in read_corpus(sys.argv[2])]
for start in range(0, len(ids), batch):
    forward_backward(model, torch.tensor(ids[start : start + batch]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return prepare_smollm2()
    except InputError as error:
        pytest.skip(str(error))


def forward_backward(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Summed next-token loss and its gradient at the embeddings. Backward frees activations as it proceeds."""
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), input_ids[:, 1:].reshape(-1), reduction="sum")
    torch.autograd.grad(loss, embeddings)
    return loss.detach()


def texts() -> list[str]:
    """Modules of Python's standard library, each longer than LENGTH tokens."""
    source = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    step = len(source) // (BATCH * BATCHES)
    return [source[start : start + 8 * LENGTH] for start in range(0, BATCH * BATCHES * step // 2, step // 2)]


@pytest.mark.parametrize("credit", ["full", "local"])
def test_scan_against_forward_and_backward(compare, smollm2, tmp_path, credit):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts()]
    assert {len(row) for row in rows} == {LENGTH}
    input_ids = torch.tensor(rows[:BATCH])
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval().requires_grad_(False)
    peaks = _peak_memory(smollm2, tmp_path, credit)
    info = {
        "tokens": input_ids.numel(),
        "goal": "<= 1.15x the time (peer >= 0.87x), <= 1.25x the memory",
        "peak memory of a whole run": f"{peaks[0] / 1e6:.2f} GB against {peaks[1] / 1e6:.2f} GB: {peaks[0] / peaks[1]:.2f}x",
    }
    peer = copy.deepcopy(model)  # the engine stays active, as in a scan; the peer runs without its hooks
    with ScanEngine(model, credit=credit) as engine, MscanWriter(tmp_path / "bench.mscan", {}, engine.layout) as writer:

        def scan() -> float:
            loss = 0.0
            for row, result in zip(input_ids, engine.scan(input_ids), strict=True):
                planes = (result.activation, result.grad_norm)
                writer.append(SequenceRecord(f"{len(writer)}", row.numpy(), result.loss, *planes, integral=result.integral))
                loss += float(np.nansum(result.loss, dtype=np.float64))
            return loss

        def check(outputs: dict[str, float]) -> None:
            assert outputs["tinyonn scan"] == pytest.approx(outputs["forward + backward"], rel=1e-4)

        candidates = {"tinyonn scan": scan, "forward + backward": lambda: float(forward_backward(peer, input_ids))}
        compare(f"scan of SmolLM2-135M, {BATCH} x {LENGTH} tokens, credit={credit}, stored", candidates, check, rounds=9, info=info)


def _peak_memory(model: Path, folder: Path, credit: str) -> list[int]:
    """Peak resident kilobytes of a whole scan and of its peer on the same texts."""
    corpus = folder / "code_corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    arguments = [str(model), str(corpus), str(folder / "whole.mscan"), str(BATCH), str(LENGTH), str(Path(__file__).parent), credit]
    commands = [[sys.executable, "-c", code, *arguments] for code in (WHOLE_SCAN, WHOLE_PEER)]
    return [int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]) for command in commands]
