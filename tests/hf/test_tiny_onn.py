"""TinyOnn through the Auto classes: configuration, sizes, files, padding, packed sequences, messages."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from tinyonn.errors import InputError
from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM, TinyOnnModel

from .tiny_onn import KINDS, SPARSE, config, left_padded, model, token_ids

NUMBERS = {"1m": 1e6, "10m": 1e7, "100m": 1e8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", NUMBERS)
def test_a_bonsai_has_the_parameters_of_its_name(size, kind):
    made = TinyOnnConfig.bonsai(size, attention=kind)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(made)
    allocated = built.num_parameters()
    share = made.init_num_experts / made.max_num_experts
    pools = (".experts.", ".attention.") if kind == "dyn_smha" else (".experts.",)
    asleep = (1 - share) * sum(p.numel() for name, p in built.named_parameters() if any(pool in name for pool in pools))
    for number in (allocated, allocated - asleep):
        assert 0.8 * NUMBERS[size] <= number <= 1.2 * NUMBERS[size]
    assert made.intermediate_size <= 128
    assert made.init_num_experts < made.max_num_experts
    assert made.max_num_experts >= 20


def test_a_bonsai_takes_options_and_its_whole_name():
    made = TinyOnnConfig.bonsai("bonsai-1M", vocab_size=300, max_num_experts=64, init_num_experts=40)
    assert (made.vocab_size, made.hidden_size, made.init_num_experts, made.max_num_experts) == (300, 128, 40, 64)


def test_an_expert_is_as_wide_as_a_head_and_a_token_uses_as_many():
    built = model(hidden_size=64, head_dim=8, init_num_experts=32, max_num_experts=40)
    experts = built.model.layers[0].experts
    assert experts.down_proj.shape == (40, 64, 8)
    assert built.config.num_attention_heads == experts.router.target_k == 8
    assert int(experts.router.expert_mask.sum()) == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atention": "full"}, "TinyOnnConfig must be given its own options, got 'atention'; did you mean 'attention'?"),
        ({"num_experts": 8}, "TinyOnnConfig must be given its own options, got 'num_experts'; did you mean 'max_num_experts'?"),
        ({"intermediate_size": 64}, "TinyOnnConfig must not be given intermediate_size, which follows from its other sizes."),
        ({"num_attention_heads": 4}, "TinyOnnConfig must not be given num_attention_heads, which follows from its other sizes."),
        ({"attention": "dyn_nas"}, "attention must be one of dyn_nsa, dyn_smha, full, got 'dyn_nas'; did you mean 'dyn_nsa'?"),
        ({"head_dim": 130}, "head_dim must be even, at most 128, and divide hidden_size 256, got 130."),
        ({"head_dim": 24}, "head_dim must be even, at most 128, and divide hidden_size 256, got 24."),
        ({"init_num_experts": 0}, "init_num_experts must be at least 1, got 0."),
        ({"max_num_experts": 8}, "max_num_experts must be at least init_num_experts 56, got 8."),
        ({"gamma": 2}, "gamma must be at least 0 and at most 1, got 2."),
        ({"w_ce": -1.0}, "w_ce must be at least 0, got -1.0."),
        ({"vocab_size": "many"}, "vocab_size must be an int, got str."),
        ({"use_cache": 1}, "use_cache must be True or False, got 1."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_and_wrong_options_have_one_line(options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        TinyOnnConfig(**options)
    assert str(caught.value) == message


def test_an_unknown_size_has_one_line():
    with pytest.raises(InputError, match=re.escape("size must be one of 1m, 10m, 100m, got '10n'; did you mean '10m'?")):
        TinyOnnConfig.bonsai("10n")


def test_what_other_tools_write_into_a_configuration_is_kept(tmp_path):
    config(quantization_note="none", _attn_implementation="sdpa").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_note == "none"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_is_the_same_model(kind, tied, tmp_path):
    first, ids = model(kind, tie_word_embeddings=tied), token_ids(2, 30)
    first.train()(ids, labels=ids).loss.backward()  # so that routers have something recorded
    first.eval().save_pretrained(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(second) is TinyOnnForCausalLM
    assert (second.lm_head.weight is second.model.embed_tokens.weight) == tied
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert second.config.to_diff_dict() == first.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(second(ids).logits, first(ids).logits)
        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) is TinyOnnModel
        assert torch.equal(base(ids).last_hidden_state, first.model(ids).last_hidden_state)
    assert second.model.layers[0].experts.statistics()["mean_k"] >= 1


def test_half_precision_keeps_what_moves_in_small_steps_in_float32(tmp_path):
    model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers() if buffer.is_floating_point()} == {torch.float32}
    loaded(token_ids(1, 20), labels=token_ids(1, 20)).loss.backward()


@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_file_lacks_are_drawn_and_the_others_kept(tmp_path):
    first = model()
    first.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = ["model.layers.1.experts.down_proj", "model.layers.0.attention.core.slope", "model.layers.0.attention.q_proj.weight"]
    save_file({name: value for name, value in state.items() if name not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    second = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(second[name], value) == (name not in lost or name.endswith("slope")), name
    assert second[lost[0]].std() == pytest.approx(float(state[lost[0]].std()), rel=0.1)
    assert second[lost[2]].std() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_next_token(kind):
    built, ids = model(kind), token_ids(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        out = built(ids, labels=labels)
    shares = out.logits.double().log_softmax(-1)
    wanted = [-shares[b, t, ids[b, t + 1]] for b in range(2) for t in range(19) if labels[b, t + 1] != -100]
    assert out.loss.item() == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_the_rows_alone(kind):
    """Each side of padding; also long rows, in which far blocks are selected."""
    built = model(kind).double()
    ids, mask = left_padded(300, 263, 17)
    with torch.no_grad():
        for flip in (False, True):
            given = (ids.flip(1), mask.flip(1)) if flip else (ids, mask)
            for use_cache in (False, True):
                logits = built(given[0], attention_mask=given[1], use_cache=use_cache).logits
                for row, real, got in zip(*given, logits, strict=True):
                    torch.testing.assert_close(got[real.bool()], built(row[real.bool()][None]).logits[0], rtol=1e-9, atol=1e-9)
            other = torch.where(given[1].bool(), given[0], 7)
            changed = built(other, attention_mask=given[1]).logits
            torch.testing.assert_close(changed[given[1].bool()], logits[given[1].bool()], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_routers_count_no_padding(kind):
    built = model(kind).train()
    ids, mask = left_padded(20, 12)
    built(ids, attention_mask=mask, labels=ids).loss.backward()
    for layer in built.model.layers:
        assert layer.experts.tokens_seen == 32
        assert layer.experts.router.pending[-1] == 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marked", ["positions", "bounds"])
def test_packed_sequences_stay_apart(kind, marked):
    built, ids = model(kind).double(), token_ids(1, 150)
    parts = ids.split([70, 1, 79], 1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    given = {"cu_seq_lens_q": torch.tensor([0, 70, 71, 150])} if marked == "bounds" else {"position_ids": positions}
    with torch.no_grad():
        got = built(ids, use_cache=False, **given).logits
        wanted = torch.cat([built(part).logits for part in parts], 1)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_inputs_of_the_layers_and_the_end(kind):
    built, ids = model(kind), token_ids(2, 20)
    with torch.no_grad():
        out = built(ids, output_hidden_states=True)
        assert torch.equal(out.hidden_states[0], built.model.embed_tokens(ids))
        assert torch.equal(out.hidden_states[1], built.model.layers[0](out.hidden_states[0]))
        assert torch.equal(built.lm_head(out.hidden_states[2]), out.logits)
        torch.testing.assert_close(built(ids, logits_to_keep=3).logits, out.logits[:, -3:])
        assert torch.equal(built(inputs_embeds=out.hidden_states[0]).logits, out.logits)
        assert torch.equal(built(ids, return_dict=False)[0], out.logits)


@pytest.mark.parametrize("kind", SPARSE)
def test_wrong_inputs_have_one_line(kind):
    built, ids = model(kind), token_ids(2, 20)
    holes = torch.ones(2, 20, dtype=torch.long)
    holes[0, 5] = 0
    wrong = {
        "attention_mask must have no padding between tokens": {"attention_mask": holes},
        r"attention_mask must be None or \(batch, 20\)": {"attention_mask": torch.ones(2, 19)},
        "got \\(2, 1, 20, 20\\)": {"attention_mask": torch.ones(2, 1, 20, 20)},
        "position_ids must count on in each of several rows": {"position_ids": torch.arange(20).expand(2, 20) % 10},
        "past_key_values must be a DynamicCache, empty or of this model": {"past_key_values": filled_cache()},
        "past_key_values must be a Cache of transformers, got tuple": {"past_key_values": ((), ())},
    }
    with torch.no_grad():
        for message, given in wrong.items():
            with pytest.raises(InputError, match=message):
                built(ids, **given)
        with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds must be given"):
            built()
    with pytest.raises(InputError, match=f"use_cache must be False where gradients are on with attention='{kind}'"):
        built(ids, use_cache=True)
    assert built(ids).past_key_values is None


def test_attention_is_chosen_by_the_configuration():
    with pytest.raises(
        InputError, match="attn_implementation must be left out for TinyOnn, whose configuration has attention, got 'dyn_nsa'"
    ):
        AutoModelForCausalLM.from_config(config(), attn_implementation="dyn_nsa")


def filled_cache() -> DynamicCache:
    """A cache of another model."""
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    return cache
