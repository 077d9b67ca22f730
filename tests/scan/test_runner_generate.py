"""Generation: the model answers, and prompt and answer are scanned in one pass."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tinyonn.errors import InputError
from tinyonn.mscan import MscanReader
from tinyonn.scan import ScanConfig, ScanEngine, run_scan
from tinyonn.scan.generation import Generator, _Noise
from tinyonn.scan.tokens import TokenSequence
from tinyonn.testing import save_tiny_model

PROMPTS = ["once upon a time", "b", "what is the answer?", "in the beginning there was"]
NEW = 6


@pytest.fixture
def config(tmp_path, tiny_model, write_corpus):
    corpus = write_corpus(PROMPTS)
    return ScanConfig(str(tiny_model), str(corpus), output_path=str(tmp_path / "g.mscan"), generate=NEW, codec="f32", batch_size=3)


def greedy(model, prompt: list[int]) -> list[int]:
    """One token at a time, without cache or batch."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def test_answers_are_the_models_greedy_ones_marked_and_scanned(config, tiny_model):
    result = run_scan(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert result.sequences == len(PROMPTS)
    with MscanReader(config.output) as reader, ScanEngine(model) as engine:
        for index, sequence in enumerate(reader.sequences):
            prompt = PROMPTS[int(sequence.sequence_id[1:])]
            expected = greedy(model, [ord(character) - 32 for character in prompt])
            assert sequence.token_ids.tolist() == expected
            assert sequence.mask.tolist() == [0] * len(prompt) + [1] * NEW
            assert sequence.text.startswith(prompt)
            assert len(sequence.text) > len(prompt)
            scanned = engine.scan(torch.tensor([expected]))[0]
            np.testing.assert_allclose(reader.planes(index)[0], scanned.activation, rtol=1e-4)
            np.testing.assert_allclose(reader.planes(index)[1], scanned.grad_norm, rtol=1e-3, atol=1e-5)


def test_sampling_is_seeded_and_resumes_with_the_same_draws(config, contents, tmp_path):
    sampled = dataclasses.replace(config, temperature=1.5, top_p=0.9, batch_size=2)
    run_scan(sampled)
    first = contents(sampled.output)
    torch.manual_seed(12345)  # the caller's own generator must not matter, nor be disturbed
    before = torch.random.get_rng_state()
    run_scan(dataclasses.replace(sampled, overwrite=True))
    assert contents(sampled.output) == first
    assert torch.equal(torch.random.get_rng_state(), before)

    again = dataclasses.replace(sampled, output_path=str(tmp_path / "resumed.mscan"))
    states = iter(range(2))

    def stop(state):
        if next(states, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scan(again, progress=stop)
    assert 0 < len(contents(again.output)) < len(PROMPTS)
    run_scan(again)
    assert contents(again.output) == first

    for size in (1, 3):  # an answer does not depend on its neighbours
        other = dataclasses.replace(sampled, batch_size=size, output_path=str(tmp_path / f"{size}.mscan"))
        run_scan(other)
        assert {name: values[0] for name, values in contents(other.output).items()} == {name: v[0] for name, v in first.items()}

    run_scan(dataclasses.replace(sampled, seed=1, overwrite=True))
    assert any(values[0] != first[name][0] for name, values in contents(sampled.output).items())


def test_sampling_draws_from_the_models_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    drawn = _Noise(list(range(4000)))(torch.zeros(4000, 1, dtype=torch.long), logits).argmax(-1)
    share = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.03, rtol=0)


def test_the_models_own_generation_settings_decide_nothing(config, contents, tmp_path):
    run_scan(config)
    plain = contents(config.output)
    folder = shutil.copytree(config.model_path, tmp_path / "set")
    GenerationConfig(repetition_penalty=50.0, suppress_tokens=list(range(60)), do_sample=True, top_k=3).save_pretrained(folder)
    other = dataclasses.replace(config, model_path=str(folder), output_path=str(tmp_path / "set.mscan"))
    run_scan(other)
    assert {name: values[0] for name, values in contents(other.output).items()} == {name: values[0] for name, values in plain.items()}


def test_an_answer_ends_with_its_end_token():

    class Model(torch.nn.Linear):
        generation_config = type("Config", (), {"eos_token_id": [7, 95]})()

        def generate(self, *, input_ids, attention_mask, max_new_tokens, **options):
            assert (self.generation_config.eos_token_id, self.generation_config.pad_token_id) == ([7, 95], 95)
            assert attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
            assert input_ids.tolist() == [[1, 2, 3], [95, 4, 5]]
            assert options["do_sample"] is False
            return torch.cat([input_ids, torch.tensor([[9, 95, 95, 95], [9, 8, 9, 8]])], 1)

    class Tokenizer:
        decode = staticmethod(lambda ids: "".join(f"<{i}>" for i in ids))

    prompts = [TokenSequence("a", np.array([1, 2, 3]), "A"), TokenSequence("b", np.array([4, 5]), "B")]
    first, second = Generator(Model(1, 1), Tokenizer(), padding=95, new_tokens=4).answer(prompts)
    assert first.token_ids.tolist() == [1, 2, 3, 9, 95]
    assert (first.text, first.answer_mask.tolist()) == ("A<9><95>", [0, 0, 0, 1, 1])
    assert second.token_ids.tolist() == [4, 5, 9, 8, 9, 8]


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def test_a_chats_last_answer_makes_room_for_the_models_own(tmp_path, write_corpus):
    model = save_tiny_model(tmp_path / "m", chat_template=TEMPLATE)
    chat = {"id": "c", "messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes"}]}
    config = ScanConfig(str(model), str(write_corpus([chat])), output_path=str(tmp_path / "o.mscan"), generate=2)
    run_scan(config)
    with MscanReader(config.output) as reader:
        assert reader.sequences[0].text.startswith("[user] hi? [assistant] ")
        assert "yes" not in reader.sequences[0].text
        assert reader.sequences[0].mask.sum() == 2


def test_a_chat_too_long_to_keep_its_end_is_left_out(tmp_path, write_corpus):
    model = save_tiny_model(tmp_path / "m", chat_template=TEMPLATE)
    chats = [{"id": text, "messages": [{"role": "user", "content": text}]} for text in ("hi?", "hi? " * 20)]
    config = ScanConfig(str(model), str(write_corpus(chats)), output_path=str(tmp_path / "o.mscan"), generate=2, max_length=30)
    assert run_scan(config).skipped == {"prompt longer than 30 tokens": 1}
    with MscanReader(config.output) as reader:
        assert [sequence.text[:23] for sequence in reader.sequences] == ["[user] hi? [assistant] "]
    write_corpus(chats[1:])
    with pytest.raises(InputError, match=r"dataset_path must hold a text to scan, got none in .* \(1 prompt longer than 30 tokens\)"):
        run_scan(dataclasses.replace(config, overwrite=True))


def test_prompt_and_answer_stay_within_the_models_positions(config, write_corpus):
    write_corpus(["z" * (128 - NEW), "y" * (129 - NEW), "x" * 300])
    result = run_scan(config)
    with MscanReader(config.output) as reader:
        assert reader.metadata["max_length"] == 128 - NEW
        assert [len(sequence.token_ids) for sequence in reader.sequences] == [128]
    assert (result.truncated, result.skipped) == (0, {"prompt longer than 122 tokens": 2})
    with pytest.raises(InputError, match="generate must leave room within the model's 128 positions, got 127"):
        run_scan(dataclasses.replace(config, generate=127, overwrite=True))
