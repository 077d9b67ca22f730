"""Log-probabilities of answers with a shared cache, and AugScore."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyonn.arc import Augmentation, Vocabulary, answer_log_probs, aug_scores, generate, views
from tinyonn.errors import InputError
from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.testing import tiny_causal_lm

PROMPT = torch.arange(40) * 7 % 15
ANSWERS = [torch.arange(length) * step % 15 for length, step in ((9, 3), (1, 1), (14, 4), (9, 7), (30, 2))]


def tiny_onn(attention: str, **options: object) -> TinyOnnForCausalLM:
    torch.manual_seed(0)
    config = TinyOnnConfig(
        vocab_size=45,
        hidden_size=32,
        head_dim=16,
        num_hidden_layers=2,
        init_num_experts=6,
        max_num_experts=8,
        attention=attention,
        **options,
    )
    return TinyOnnForCausalLM(config).eval()


MODELS = {
    "llama": lambda: tiny_causal_lm("llama"),
    "sliding window": lambda: tiny_causal_lm("mistral"),
    "linear attention": lambda: tiny_causal_lm("lfm2"),
    "tinyonn full": lambda: tiny_onn("full"),
    "tinyonn dyn_nsa": lambda: tiny_onn("dyn_nsa"),
    "tinyonn dyn_smha": lambda: tiny_onn("dyn_smha"),
}


def one_by_one(model, prompt, answers):
    """Each answer in a forward pass of its own, without a cache and without padding."""
    found = []
    for answer in answers:
        ids = torch.cat([prompt, answer])
        log_probs = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(log_probs[torch.arange(len(answer)), answer].sum())
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_answers_that_share_a_cache_score_as_alone(kind, batch_size):
    model = MODELS[kind]().double()
    found = answer_log_probs(model, PROMPT, ANSWERS, batch_size=batch_size)
    torch.testing.assert_close(found, one_by_one(model, PROMPT, ANSWERS), rtol=1e-9, atol=1e-9)


def test_the_prompt_passes_the_model_once():
    model = tiny_causal_lm("llama")
    widths = []
    model.register_forward_pre_hook(lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    answer_log_probs(model, PROMPT, ANSWERS, batch_size=3)
    assert widths == [(1, 39), (3, 9), (2, 30)]


@pytest.mark.parametrize("kind", ["llama", "linear attention"])
def test_only_answers_get_logits(kind):
    model, widths = MODELS[kind](), []
    model.register_forward_hook(lambda module, args, output: widths.append(output.logits.shape[1]))
    answer_log_probs(model, PROMPT, ANSWERS, batch_size=3)
    assert widths == [1, 9, 30]  # one for the cache of the prompt


@pytest.mark.parametrize("kind", ["llama", "linear attention"])
@torch.no_grad()
def test_a_model_that_gives_all_logits_scores_alike(kind):
    model = MODELS[kind]().double()

    class Older(type(model)):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
            return super().forward(input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache)

    expected = answer_log_probs(model, PROMPT, ANSWERS, batch_size=3)
    model.__class__ = Older
    torch.testing.assert_close(answer_log_probs(model, PROMPT, ANSWERS, batch_size=3), expected, rtol=1e-9, atol=1e-9)


def test_a_model_in_training_is_so_again():
    model = tiny_causal_lm("llama").train()
    model.lm_head.eval()
    answer_log_probs(model, PROMPT, ANSWERS)
    assert model.training
    assert not model.lm_head.training


@torch.no_grad()
def test_aug_score_is_the_sum_over_eight_views():
    model, vocabulary = tiny_causal_lm("llama", max_position_embeddings=1024).double(), Vocabulary(numbered_rows=True)
    task = generate(1, seed=3, largest=4)[0]
    candidates = [task.test[0].output, task.test[0].input, np.zeros((2, 3), dtype=np.int8)]
    expected = torch.zeros(3, dtype=torch.float64)
    for symmetry in range(8):
        turned = Augmentation(symmetry)
        prompt = torch.from_numpy(vocabulary.encode(turned.task(task)).prompt)
        answers = [torch.from_numpy(vocabulary.encode_answer(turned.grid(grid))) for grid in candidates]
        expected += one_by_one(model, prompt, answers)
    found = aug_scores(model, vocabulary, task, 0, candidates)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    # A symmetry reorders the views, so the sum of a task's view is that of the task.
    turned, view = views(task)[5]
    assert aug_scores(model, vocabulary, view, 0, [turned.grid(grid) for grid in candidates]) == pytest.approx(found, abs=1e-9)


def test_nothing_to_score_is_refused_or_empty():
    model = tiny_causal_lm("llama")
    assert answer_log_probs(model, PROMPT, []).tolist() == []
    assert aug_scores(model, Vocabulary(), generate(1)[0], 0, []) == []
    with pytest.raises(InputError, match="prompt and answers must have at least one token"):
        answer_log_probs(model, PROMPT, [PROMPT[:0]])
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        answer_log_probs(model, PROMPT, ANSWERS, batch_size=0)
