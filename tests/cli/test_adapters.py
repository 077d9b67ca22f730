"""`-m` takes a PEFT adapter's folder: it is read merged into its base model, under the base model's names."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.training import load_classifier
from tinyonn.hf.loading import load_model
from tinyonn.mscan import MscanReader
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

RANK, ALPHA = 3, 5.0
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def save_adapter(base: Path, folder: Path, targets: list[str], **options: Any) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(str(folder))
    return folder


def merged_by_hand(base: Path, adapter: Path, folder: Path) -> Path:
    """A copy of the base model with alpha / rank · B·A added to its weights file."""
    shutil.copytree(base, folder)
    weights, products = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, down in products.items():
        if name.endswith("lora_A.weight"):
            own = name.removeprefix("base_model.model.").replace("lora_A.", "")
            delta = ALPHA / RANK * products[name.replace("lora_A", "lora_B")] @ down
            weights[own] = weights[own] + (delta.T if "c_attn" in own or "c_fc" in own else delta)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a base model, its adapter, and both merged by hand."""
    root = tmp_path_factory.mktemp(request.param)
    base = save_tiny_model(root / "base", request.param)
    adapter = save_adapter(base, root / "adapter", TARGETS[request.param])
    return base, adapter, merged_by_hand(base, adapter, root / "merged")


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    base = save_tiny_model(tmp_path / "base")
    return base, save_adapter(base, tmp_path / "adapter", TARGETS["llama"])


def values(path: Path) -> tuple[list[str], list[tuple[np.ndarray, ...]], dict[str, Any]]:
    with MscanReader(path) as reader:
        rows = [(*reader.planes(i), np.asarray(sequence.loss)) for i, sequence in enumerate(reader.sequences)]
        return [entry.name for entry in reader.layout], rows, dict(reader.metadata)


def test_an_adapter_is_scanned_as_the_merged_model(
    cli: Cli, family: tuple[Path, Path, Path], corpus: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base, adapter, merged = family
    found = {}
    for name, model in (("base", base), ("adapter", adapter), ("merged", merged)):
        ran = cli("scan", "-m", model, "-d", corpus, "-o", tmp_path / f"{name}.mscan", "--limit", 3, "--codec", "f32")
        assert ran.code == 0, ran.err
        found[name] = values(tmp_path / f"{name}.mscan")
    assert found["adapter"][0] == found["merged"][0] == found["base"][0]  # no base_layer, no lora_A
    for mine, wanted, without in zip(found["adapter"][1], found["merged"][1], found["base"][1], strict=True):
        for plane, expected in zip(mine, wanted, strict=True):
            np.testing.assert_allclose(plane, expected, rtol=2e-4, atol=1e-4)
        assert not np.allclose(mine[2][:-1], without[2][:-1], rtol=1e-2)
    metadata = found["adapter"][2]
    assert not recwarn.list
    assert (metadata["model"], metadata["base_model"], metadata["parameters"]) == ("adapter", str(base), found["base"][2]["parameters"])
    hashes = [found[name][2]["model_weights_sha256"] for name in found]
    assert len(set(hashes)) == 3


def test_heads_are_scored_in_the_merged_model(cli: Cli, family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, adapter, merged = family
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"is {n} odd", "passage": "yes it is" if n % 2 else "no it is not", "answer": bool(n % 2)} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = []
    for name, model in (("adapter", adapter), ("merged", merged)):
        ran = cli("heads", "score", "-m", model, "-d", data, "-o", tmp_path / name, "--max-samples", 6)
        assert ran.code == 0, ran.err
        tables.append(np.loadtxt(tmp_path / name / "scores_raw.csv", delimiter=",", skiprows=1))
    np.testing.assert_allclose(*tables, rtol=2e-4)


def test_a_classifier_is_trained_from_the_merged_model(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    merged = load_file(merged_by_hand(base, adapter, tmp_path / "merged") / "model.safetensors")
    model = load_classifier(adapter, ["no", "yes"], torch.device("cpu"))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        if name != "score.weight":
            torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


def test_a_classifiers_adapter_brings_its_head(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False))
    head = {name: value for name, value in adapted.named_parameters() if "score" in name and "default" in name}
    adapted.save_pretrained(str(tmp_path / "adapter"))
    found = load_model(
        tmp_path / "adapter", torch.float32, torch.device("cpu"), "AutoModelForSequenceClassification", ["score"], num_labels=3
    )
    assert torch.equal(found.get_parameter("score.weight"), next(iter(head.values())))


@pytest.mark.parametrize("own", [False, True], ids=["of the base model", "of the adapter"])
def test_the_tokenizer_is_found_and_a_report_shows_words(
    cli: Cli, llama: tuple[Path, Path], corpus: Path, tmp_path: Path, own: bool
) -> None:
    base, adapter = llama
    if own:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.move(base / name, adapter / name)
    assert cli("scan", "-m", adapter, "-d", corpus, "-o", tmp_path / "o.mscan", "--limit", 1).code == 0
    assert cli("report", tmp_path / "o.mscan", "-o", tmp_path / "o.html", "--no-figures").code == 0
    page = (tmp_path / "o.html").read_text()
    assert '"pieces":["C","a","t"' in page.replace(" ", "")


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]], ids="+".join)
def test_an_adapter_of_one_use_of_a_tied_weight_leaves_the_other_as_it_was(
    cli: Cli, llama: tuple[Path, Path], corpus: Path, tmp_path: Path, targets: list[str]
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "tied")
    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", targets)
    ran = cli("scan", "-m", adapter, "-d", corpus, "-o", tmp_path / "o.mscan", "--limit", 3)
    assert ran.code == 0, ran.err
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with MscanReader(tmp_path / "o.mscan") as reader, torch.no_grad():
        for sequence in reader.sequences:
            tokens = torch.tensor(sequence.token_ids)
            expected = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            np.testing.assert_allclose(sequence.loss[:-1], expected.numpy(), rtol=1e-4)


def adapter_with_more_tokens(folder: Path, targets: list[str], *, tied: bool) -> peft.PeftModel:
    """Model with an adapter of five tokens more than its base, saved into `folder`."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder.parent / "base", tie_word_embeddings=tied))
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 5)
    settings = {"r": RANK, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize(("tied", "targets"), [(False, ["q_proj"]), (True, ["q_proj"]), (True, ["embed_tokens"])], ids=str)
def test_an_adapter_trained_with_more_tokens_brings_their_embeddings(
    cli: Cli, corpus: Path, tmp_path: Path, tied: bool, targets: list[str]
) -> None:
    adapted = adapter_with_more_tokens(tmp_path / "adapter", targets, tied=tied)
    ran = cli("scan", "-m", tmp_path / "adapter", "-d", corpus, "-o", tmp_path / "o.mscan", "--limit", 2)
    assert ran.code == 0, ran.err
    with MscanReader(tmp_path / "o.mscan") as reader, torch.no_grad():
        for sequence in reader.sequences:
            tokens = torch.tensor(sequence.token_ids)
            expected = torch.nn.functional.cross_entropy(adapted(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            np.testing.assert_allclose(sequence.loss[:-1], expected.numpy(), rtol=1e-4)


def test_an_adapter_without_the_head_of_its_further_tokens_is_refused(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    """PEFT saves the head only where the embeddings have no product of their own."""
    adapted = adapter_with_more_tokens(tmp_path / "adapter", ["embed_tokens"], tied=False)
    tokens = adapted.base_model.model.config.vocab_size
    ran = cli("scan", "-m", tmp_path / "adapter", "-d", corpus, "-o", tmp_path / "o.mscan", "--limit", 2)
    one_line(ran, f"the adapter has embeddings for {tokens} tokens, but no output head for them", command="tinyonn scan")


def test_another_scale_is_another_scan(cli: Cli, llama: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    base, adapter = llama
    given = ["scan", "-m", adapter, "-d", corpus, "-o", tmp_path / "o.mscan"]
    assert cli(*given, "--limit", 1).code == 0
    moved = json.loads((adapter / "adapter_config.json").read_text())
    base.rename(tmp_path / "elsewhere")
    moved["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (adapter / "adapter_config.json").write_text(json.dumps(moved))
    assert cli(*given, "--limit", 2).code == 0  # the same adapter of the same model, which lies elsewhere now
    moved["lora_alpha"] = 2 * ALPHA
    (adapter / "adapter_config.json").write_text(json.dumps(moved))
    one_line(cli(*given, "--limit", 3), "same configuration", "adapter_config_sha256", command="tinyonn scan")


def test_a_base_model_beside_the_adapter_is_found(cli: Cli, llama: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    _, adapter = llama
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "../base"}))
    assert cli("scan", "-m", adapter, "-d", corpus, "-o", tmp_path / "o.mscan", "--limit", 1).code == 0


def drop_weight(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(weights, adapter / "adapter_model.safetensors")


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


REFUSED = {
    "no base": (settings(base_model_name_or_path=None), ["must be an adapter with a base model", "names none"]),
    "base gone": (settings(base_model_name_or_path="/gone/base"), ["adapter adapter needs its base model: ", "/gone/base"]),
    "prompts": (settings(peft_type="PROMPT_TUNING"), ["adapter of weights, such as LoRA", "PROMPT_TUNING"]),
    "damaged": (lambda a: (a / "adapter_config.json").write_text("{"), ["valid adapter_config.json"]),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), ["the adapter's weights (adapter_model.safetensors)"]),
    "a weight missing": (drop_weight, ["all weights of the adapter, got adapter without", "layers.1.self_attn.q_proj.lora_B"]),
    "another rank": (settings(r=7), ["can be merged into its base model, got adapter", "size mismatch"]),
    "other targets": (settings(target_modules=["q_proj", "v_proj"]), ["adapter of its base model, got adapter with", "down_proj"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_one_line(cli: Cli, llama: tuple[Path, Path], corpus: Path, tmp_path: Path, case: str) -> None:
    change, parts = REFUSED[case]
    change(llama[1])
    ran = cli("scan", "-m", llama[1], "-d", corpus, "-o", tmp_path / "o.mscan")
    one_line(ran, *parts, command="tinyonn scan")
    assert len(ran.err) < 420
    assert not (tmp_path / "o.mscan").exists()


def test_without_peft_the_remedy_is_named(
    cli: Cli, llama: tuple[Path, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    ran = cli("scan", "-m", llama[1], "-d", corpus, "-o", tmp_path / "o.mscan")
    one_line(ran, "needs peft: pip install peft", "merge", command="tinyonn scan")


def test_an_adapter_on_experts_is_merged_too(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "qwen3_moe")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = save_adapter(base, tmp_path / "adapter", ["q_proj"], target_parameters=names)
    for name, model in (("base", base), ("adapter", adapter)):
        ran = cli("scan", "-m", model, "-d", corpus, "-o", tmp_path / f"{name}.mscan", "--limit", 2)
        assert ran.code == 0, ran.err
    one, other = values(tmp_path / "base.mscan"), values(tmp_path / "adapter.mscan")
    assert one[0] == other[0]
    model = AutoModelForCausalLM.from_pretrained(base)
    whole = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with MscanReader(tmp_path / "adapter.mscan") as reader, torch.no_grad():
        tokens = torch.as_tensor(np.asarray(reader.sequences[0].token_ids))[None]
        logits = whole(input_ids=tokens).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    np.testing.assert_allclose(other[1][0][2][:-1], expected.numpy(), rtol=1e-3, atol=1e-4)


def test_a_library_user_gets_the_same_error(llama: tuple[Path, Path]) -> None:
    drop_weight(llama[1])
    with pytest.raises(InputError, match="all weights of the adapter"):
        load_model(llama[1], torch.float32, torch.device("cpu"))
