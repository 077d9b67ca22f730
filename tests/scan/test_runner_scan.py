"""A whole scan: what the file holds is what the model did, whatever the batches were."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tinyonn.errors import InputError
from tinyonn.mscan import MscanReader
from tinyonn.scan import ScanConfig, ScanEngine, run_scan
from tinyonn.testing import save_tiny_model

TEXTS = ["hello world", "a", "the quick brown fox jumps over the lazy dog", "", "ab", "x" * 200, "one more line of text"]


def ids_of(text: str) -> list[int]:
    return [ord(character) - 32 for character in text]


@pytest.fixture
def scan(tmp_path, tiny_model, write_corpus):
    """`scan(records, **options) -> (result, reader)`."""
    readers = []

    def run(records, *, model=tiny_model, corpus_name="abc_corpus.jsonl", **options):
        options = {"output_path": str(tmp_path / "out.mscan"), "codec": "f32", **options}
        result = run_scan(ScanConfig(str(model), str(write_corpus(records, corpus_name)), **options))
        readers.append(MscanReader(result.path))
        return result, readers[-1]

    yield run
    for reader in readers:
        reader.close()


def by_id(reader):
    return {sequence.sequence_id: index for index, sequence in enumerate(reader.sequences)}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stored_values_are_those_of_each_text_scanned_alone(scan, tiny_model, batch_size):
    texts = [text for text in TEXTS if text]
    result, reader = scan(texts, batch_size=batch_size, max_length=100)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (result.sequences, result.truncated, result.skipped) == (5, 1, {"shorter than 2 tokens": 1})
    places = by_id(reader)
    with ScanEngine(model) as engine:
        for number, text in enumerate(texts):
            if len(text) < 2:
                assert f"t{number}" not in places
                continue
            expected = engine.scan(torch.tensor([ids_of(text)[:100]]))[0]
            index = places[f"t{number}"]
            sequence, (activation, grad_norm) = reader.sequences[index], reader.planes(index)
            assert sequence.token_ids.tolist() == ids_of(text)[:100]
            assert sequence.text == text[:100]
            np.testing.assert_allclose(activation, expected.activation, rtol=1e-4)
            np.testing.assert_allclose(grad_norm, expected.grad_norm, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(sequence.loss, expected.loss, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(reader.sequence_integral(index).sps, expected.integral.sps, rtol=1e-2, atol=1e-2)
            assert sequence.mask.tolist() == [1] * len(sequence.token_ids)


def test_totals_and_mean_loss_of_the_result(scan):
    result, reader = scan(["hello world", "more text"])
    losses = np.concatenate([sequence.loss for sequence in reader.sequences])
    assert result.tokens == 20
    assert result.loss == pytest.approx(np.nanmean(losses, dtype=np.float64))
    assert reader.integral().count.max() == 18


def test_progress_ends_with_every_record_accounted_for(tmp_path, tiny_model, write_corpus):
    states = []
    corpus = write_corpus([text for text in TEXTS if text])
    run_scan(ScanConfig(str(tiny_model), str(corpus), output_path=str(tmp_path / "o.mscan"), batch_size=2), progress=states.append)
    assert [state.stage for state in states[:2]] == ["loading", "scanning"]
    assert (states[-1].done, states[-1].total) == (6, 6)
    assert [state.done for state in states] == sorted(state.done for state in states)
    assert states[-1].loss > 0
    assert states[-1].tokens_per_second > 0


def test_metadata_says_what_was_scanned_and_names_no_other_path_than_the_models(scan, tiny_model, tmp_path):
    _, reader = scan(["hello world"], credit="local", store="integral", seed=3)
    metadata = reader.metadata
    expected = {
        "model": "tiny-llama",
        "topic": "abc",
        "corpus": "abc_corpus.jsonl",
        "credit": "local",
        "targets": "all",
        "reduction": "sum",
        "block_size": 64,
        "dtype": "float32",
        "torch": torch.__version__,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "seed": 3,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert all(len(metadata[key]) == 64 for key in metadata if key.endswith("_sha256"))
    assert metadata["model_path"] == str(tiny_model)
    others = json.dumps({key: value for key, value in metadata.items() if key != "model_path"})
    assert str(tmp_path) not in others
    assert str(tiny_model.parent) not in others


def test_integral_store_keeps_sums_and_losses_and_no_planes(scan, tmp_path):
    _, full = scan(["hello world", "some more"])
    _, sums = scan(["hello world", "some more"], store="integral", output_path=str(tmp_path / "sums.mscan"))
    assert [sequence.has_records for sequence in sums.sequences] == [False, False]
    for index in range(2):
        for ours, theirs in zip(sums.sequence_integral(index).planes(), full.sequence_integral(index).planes(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(sums.sequences[index].loss, full.sequences[index].loss)


def test_texts_are_left_out_where_asked(scan):
    _, reader = scan(["hello world"], store_text=False)
    assert reader.sequences[0].text is None
    assert reader.sequences[0].token_ids.tolist() == ids_of("hello world")


def test_two_scans_of_one_configuration_store_the_same(scan, contents, tmp_path):
    texts = [f"text number {i} " * (i % 4 + 1) for i in range(12)]
    first, _ = scan(texts, codec="log2u16")
    second, _ = scan(texts, codec="log2u16", output_path=str(tmp_path / "again.mscan"))
    assert contents(first.path) == contents(second.path)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = {"id": "c", "messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes"}]}
SYSTEM = {"id": "s", "messages": [{"role": "system", "content": "be"}]}


def test_chats_are_read_through_the_models_template(scan, tmp_path):
    model = save_tiny_model(tmp_path / "m", chat_template=TEMPLATE)
    _, reader = scan([CHAT], model=model)
    assert reader.sequences[0].text == "[user] hi? [assistant] yes "
    assert reader.sequences[0].token_ids.tolist() == ids_of("[user] hi? [assistant] yes ")


def test_chats_without_a_template_are_refused(scan):
    with pytest.raises(InputError, match="dataset_path must hold plain text where the tokenizer has no chat template, got messages in c"):
        scan([CHAT])


def test_a_chat_that_the_template_refuses_is_named_or_skipped(scan, tmp_path):
    model = save_tiny_model(tmp_path / "m", chat_template=TEMPLATE)
    with pytest.raises(InputError, match="got s: no system turn; --skip-bad leaves it out"):
        scan([SYSTEM, CHAT], model=model)
    result, _ = scan([SYSTEM, CHAT], model=model, skip_bad=True)
    assert (result.sequences, result.skipped) == (1, {"refused by the chat template": 1})


def test_malformed_lines_are_counted_with_skip_bad(tmp_path, tiny_model):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "hello"}\n{"text": \n{"text": "world"}\n')
    result = run_scan(ScanConfig(str(tiny_model), str(corpus), output_path=str(tmp_path / "o.mscan"), skip_bad=True))
    assert (result.sequences, result.skipped) == (2, {"malformed record": 1})


def test_long_texts_stop_at_the_models_own_limit(scan):
    result, reader = scan(["y" * 300], max_length=512)
    assert result.truncated == 1
    assert len(reader.sequences[0].token_ids) == 128
    assert reader.metadata["max_length"] == 128


@pytest.mark.parametrize("arch", ["gpt2", "qwen3_moe"])
def test_other_architectures_scan_to_a_file(scan, tmp_path, arch):
    model = save_tiny_model(tmp_path / arch, arch)
    result, reader = scan(["hello world", "some text that is longer"], model=model)
    activation, grad_norm = reader.planes(0)
    labelled = activation[:-1]
    assert result.sequences == 2
    assert np.isnan(activation[-1]).all()
    assert (np.isnan(labelled).any() and not np.isnan(labelled).all()) if arch == "qwen3_moe" else not np.isnan(labelled).any()
    np.testing.assert_array_equal(np.isnan(activation), np.isnan(grad_norm))
    assert np.nanmax(grad_norm) > 0


def test_half_precision_is_what_the_file_says(scan):
    _, reader = scan(["hello world"], dtype="bf16")
    assert reader.metadata["dtype"] == "bfloat16"
    assert np.isfinite(reader.planes(0)[0][:-1]).all()


def test_targets_choose_the_blocks(scan):
    _, reader = scan(["hello world"], targets="attention")
    assert {entry.name.split(".")[-2] for entry in reader.layout} == {"q_proj", "k_proj", "v_proj", "o_proj"}
