"""What a scan will take is known before it runs, and is what it takes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tinyonn.errors import InputError
from tinyonn.hf import loading
from tinyonn.scan import ScanConfig, estimate, estimate_scan, run_scan
from tinyonn.scan.engine.activations import saved_bytes
from tinyonn.scan.engine.forward import logits_from_embeddings
from tinyonn.testing import save_tiny_model, tiny_causal_lm

TEXTS = [f"text {i}: " + "word " * (i * 7 % 19 + 1) for i in range(40)]


@pytest.fixture
def config(tmp_path, tiny_model, write_corpus):
    return ScanConfig(str(tiny_model), str(write_corpus([*TEXTS, "x", "y" * 300])), output_path=str(tmp_path / "o.mscan"))


@pytest.mark.parametrize(
    "options",
    [{}, {"codec": "f32"}, {"store": "integral"}, {"store_text": False}, {"generate": 5}, {"targets": "mlp"}],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_size_and_tokens_are_those_of_the_file(tmp_path, tiny_model, write_corpus, options):
    config = ScanConfig(str(tiny_model), str(write_corpus([*TEXTS, "y" * 300])), output_path=str(tmp_path / "o.mscan"), **options)
    expected = estimate_scan(config)
    result = run_scan(config)
    assert (expected.sequences, expected.truncated, dict(expected.skipped)) == (result.sequences, result.truncated, result.skipped)
    assert expected.tokens == result.tokens
    assert expected.total_bytes == pytest.approx(config.output.stat().st_size, rel=0.15)


def test_nothing_is_loaded_or_written(config, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    found = estimate_scan(config)
    assert found.skipped == {"shorter than 2 tokens": 1}
    assert not config.output.exists()
    assert found.weight_bytes == 4 * sum(parameter.numel() for parameter in tiny_causal_lm("llama").parameters())


def test_a_large_corpus_is_judged_by_an_even_sample(config, monkeypatch, write_corpus):
    write_corpus(["a" * 10, "b" * 30] * 500)
    exact = estimate_scan(config)
    monkeypatch.setattr(estimate, "SAMPLED_RECORDS", 75)
    sampled = estimate_scan(config)
    assert (exact.sampled, sampled.sampled) == (False, True)
    assert (exact.sequences, exact.tokens) == (1000, 20_000)
    assert sampled.sequences == 1000
    assert sampled.tokens == pytest.approx(exact.tokens, rel=0.1)
    assert sampled.total_bytes == pytest.approx(exact.total_bytes, rel=0.1)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2", "qwen3_moe", "gpt_oss", "bloom", "lfm2", "gptj"])
def test_traced_activations_are_those_that_autograd_saves(arch):
    model = tiny_causal_lm(arch).requires_grad_(False)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = logits_from_embeddings(model, torch.arange(64).view(2, 32))
    measured = sum(size for size, _ in saved.values())
    assert kept[0].requires_grad
    assert saved_bytes(copy.deepcopy(model.config), torch.float32, 2, 32) == pytest.approx(measured, rel=0.2)


def test_tracing_touches_neither_memory_nor_the_configuration(tiny_model):
    model_config = loading.load_config(tiny_model)
    model_config.hidden_size, model_config.intermediate_size, model_config.head_dim = 8192, 28672, 128
    model_config.num_attention_heads, model_config.num_key_value_heads, model_config.num_hidden_layers = 64, 8, 80
    before = model_config.to_dict()
    assert saved_bytes(model_config, torch.bfloat16, 1, 128) > 10**9  # 70 billion weights, which nothing here could hold
    assert model_config.to_dict() == before


def test_a_model_that_cannot_be_traced_is_judged_by_its_linear_layers(config, monkeypatch):
    traced = estimate_scan(config)

    def fail(*args):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(estimate, "saved_bytes", fail)
    fallen_back = estimate_scan(config)
    assert (traced.traced, fallen_back.traced) == (True, False)
    assert 0.4 < fallen_back.activation_bytes / traced.activation_bytes < 2.5


def test_linear_outputs_count_only_the_experts_a_token_meets():
    model = tiny_causal_lm("qwen3_moe")
    attention = 4 * 16 + 2 * 2 * 16 + 48  # q, k and v, o
    experts = 2 * (2 * 40 + 48)  # two of five: gate and up, down
    assert estimate.linear_outputs(model, 2) == pytest.approx(3 * (attention + experts), rel=0.15)


RUN = """
import json, sys
from pathlib import Path
from tinyonn.scan import ScanConfig, estimate_scan, run_scan
config = ScanConfig(sys.argv[1], sys.argv[2], output_path=sys.argv[3], batch_size=8)
expected = estimate_scan(config)
run_scan(config)
# Not ru_maxrss, which also counts the process that started this one.
lines = Path("/proc/self/status").read_text().splitlines()
peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
print(json.dumps([expected.peak_memory_bytes, expected.process_bytes, expected.weight_bytes, peak]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_within_a_third(tmp_path, write_corpus):
    model = save_tiny_model(tmp_path / "m", hidden_size=256, intermediate_size=768, num_hidden_layers=6, max_position_embeddings=512)
    corpus = write_corpus(["hello, world; " * 40] * 8)
    arguments = [str(model), str(corpus), str(tmp_path / "o.mscan")]
    run = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True, text=True)
    expected, process, weights, peak = json.loads(run.stdout.splitlines()[-1])
    assert expected - process - weights > 0.3 * expected  # what is traced matters here
    assert expected == pytest.approx(peak, rel=0.3)


def test_verdicts_compare_with_what_is_free(config, monkeypatch):
    found = estimate_scan(config)
    assert found.peak_memory_bytes == found.weight_bytes + found.activation_bytes + found.plane_bytes + found.process_bytes
    assert found.fits_memory
    assert found.fits_disk
    monkeypatch.setattr(estimate, "available_memory", lambda device: found.peak_memory_bytes - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=found.total_bytes - 1))
    tight = estimate_scan(config)
    assert not tight.fits_memory
    assert not tight.fits_disk


def test_bad_input_is_refused_as_a_scan_would(config, tmp_path):
    with pytest.raises(InputError, match="dataset_path must be an existing file"):
        estimate_scan(ScanConfig(config.model_path, str(tmp_path / "none.jsonl")))
    with pytest.raises(InputError, match="targets must match a module, got 'nothing'"):
        estimate_scan(ScanConfig(config.model_path, config.dataset_path, targets="nothing"))
