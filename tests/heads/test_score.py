"""A whole run: questions and a model in, files out; complete, repeatable, or with one line that says why not."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from tinyonn._io.options import commented_yaml
from tinyonn.errors import InputError
from tinyonn.heads.progress import Progress
from tinyonn.heads.score.config import ScoreConfig
from tinyonn.heads.score.score import score_heads
from tinyonn.heads.score.scores import SCORES, register_score
from tinyonn.testing import save_tiny_model, tiny_encoder

FILES = {
    "config.yaml", "run.log", "scores_combined.csv", "scores_norm.csv", "scores_raw.csv", "summary.json", "topk_global.json",
    "topk_per_layer.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pooler is left out, as in many checkpoints."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-bert")
    model = tiny_encoder("bert")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(folder, state_dict=weights)
    return folder


@pytest.fixture
def run(score_run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(**options)`: of a ScoreConfig, with the tiny Llama and seven questions of the lengths question_sizes."""
    return score_run


def table(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path) as file:
        columns, *rows = csv.reader(file)
    return columns, np.array(rows, dtype=float)


def test_a_run_writes_a_row_for_every_head_in_every_table(run, tmp_path):
    result = run()
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    heads = [[layer, head] for layer in range(3) for head in range(4)]
    for name, columns in {
        "scores_raw": ["out_raw", "ent_raw", "task_raw"],
        "scores_norm": ["out_z", "ent_z", "task_z"],
        "scores_combined": ["combined"],
    }.items():
        found, rows = table(tmp_path / "out" / f"{name}.csv")
        assert found == ["layer", "head", *columns]
        assert rows[:, :2].tolist() == heads
    _, raw = table(tmp_path / "out" / "scores_raw.csv")
    assert raw[:, 2].tolist() == [float(f"{x:.9g}") for layer in result.raw["out"] for x in layer]
    assert (raw[:, 2] > 0).all()
    assert ((raw[:, 3] < 0) & (raw[:, 3] > -np.log(80))).all()
    assert ((raw[:, 4] > 0) & (raw[:, 4] < 1)).all()


def test_norms_and_the_fusion_follow_from_the_raw_scores(run, tmp_path):
    run(lambda_ent=0.25, lambda_task=2.0)
    raw = table(tmp_path / "out" / "scores_raw.csv")[1][:, 2:].reshape(3, 4, 3)
    norm = table(tmp_path / "out" / "scores_norm.csv")[1][:, 2:].reshape(3, 4, 3)
    combined = table(tmp_path / "out" / "scores_combined.csv")[1][:, 2].reshape(3, 4)
    np.testing.assert_allclose(norm, stats.zscore(raw, axis=1), rtol=1e-5, atol=1e-6)
    assert combined.tolist() == (stats.rankdata(raw, axis=1) @ np.array([1.0, 0.25, 2.0])).tolist()
    assert table(tmp_path / "out" / "scores_norm.csv")[0] == ["layer", "head", "out_z", "ent_z", "task_z"]
    run(norm_mode="percentile")
    columns, norm = table(tmp_path / "out" / "scores_norm.csv")
    assert columns == ["layer", "head", "out_percentile", "ent_percentile", "task_percentile"]
    norm = norm[:, 2:].reshape(3, 4, 3)
    np.testing.assert_allclose(norm, (stats.rankdata(raw, axis=1) - 1) / 3, rtol=1e-8)


def test_the_best_heads_are_listed_over_all_layers_and_in_each(run, tmp_path):
    run(top_k=3)
    combined = table(tmp_path / "out" / "scores_combined.csv")[1]
    best = json.loads((tmp_path / "out" / "topk_global.json").read_text())
    wanted = sorted(combined.tolist(), key=lambda row: (-row[2], row[0], row[1]))[:3]
    assert best == [
        {"rank": rank, "layer": layer, "head": head, "combined": score} for rank, (layer, head, score) in enumerate(wanted, start=1)
    ]
    layers = json.loads((tmp_path / "out" / "topk_per_layer.json").read_text())
    assert list(layers) == ["0", "1", "2"]
    for layer, heads in layers.items():
        rows = sorted(combined[combined[:, 0] == int(layer)].tolist(), key=lambda row: (-row[2], row[1]))[:3]
        assert heads == [{"rank": rank, "head": head, "combined": score} for rank, (_, head, score) in enumerate(rows, start=1)]


@pytest.mark.parametrize("query_mode", ["last_token", "all_tokens"])
def test_two_runs_with_one_seed_write_the_same_bytes(run, tmp_path, query_mode):
    for folder in ("first", "second"):
        run(output_dir=tmp_path / folder, max_samples=5, seed=3, score_query_mode=query_mode)
    for name in ("scores_raw.csv", "scores_norm.csv", "scores_combined.csv", "topk_global.json", "topk_per_layer.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    run(output_dir=tmp_path / "third", max_samples=5, seed=4, score_query_mode=query_mode)
    assert (tmp_path / "first" / "scores_raw.csv").read_bytes() != (tmp_path / "third" / "scores_raw.csv").read_bytes()


def test_batch_size_changes_nothing_but_rounding(run, tmp_path):
    alone, together = (run(output_dir=tmp_path / str(size), batch_size=size).raw for size in (1, 7))
    for name, rows in alone.items():
        np.testing.assert_allclose(rows, together[name], rtol=1e-5, atol=1e-6)


def test_an_encoder_without_a_pooler_is_scored(run, bert):
    result = run(model_path=bert)
    assert result.summary["heads"] == 12
    assert all(np.isfinite(rows).all() for rows in result.raw.values())


def test_the_summary_counts_what_was_read(run, question_sizes, tmp_path):
    states: list[Progress] = []
    run(progress=states.append, max_length=35)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    lengths = [len("Question: \nChoices:\nA. yes\nB. no\nAnswer:") + size for size in question_sizes]
    assert summary["model"] == "tiny-llama"
    assert summary["samples"] == summary["rows"] == 7
    assert summary["answered"] == 0
    assert summary["tokens"] == sum(min(length, 35) for length in lengths)
    assert summary["truncated"] == sum(length > 35 for length in lengths) == 7
    assert summary["spans_lost"] == sum(size + len("Question: ") > 35 for size in question_sizes) == 2
    assert (summary["layers"], summary["heads"], summary["max_length"]) == (3, 12, 35)
    assert (summary["dtype"], summary["device"], summary["field_map"]) == ("float32", "cpu", "standard")
    assert set(summary["versions"]) == {"tinyonn", "torch", "transformers", "numpy", "python"}
    assert [(state.stage, state.fraction) for state in states] == [("loading", None), ("scoring", 4 / 7), ("scoring", 1.0)]
    log = (tmp_path / "out" / "run.log").read_text()
    assert "7 truncated, 2 without their whole question" in log
    assert re.search(r"Z done: 7 samples, \d+ tokens in ", log.splitlines()[-1])


def test_prompts_that_lost_their_question_count_for_all_scores_but_that_of_the_question(run, question_sizes, tmp_path):
    rows = (tmp_path / "data.jsonl").read_text().splitlines()
    whole = run(max_length=35).raw
    (tmp_path / "data.jsonl").write_text("\n".join(row for row, size in zip(rows, question_sizes, strict=True) if size <= 25))
    kept = run(max_length=35).raw
    np.testing.assert_allclose(whole["task"], kept["task"], rtol=1e-5)
    assert np.abs(np.array(whole["out"]) - np.array(kept["out"])).max() > 1e-3


def test_the_models_own_limit_holds_where_it_is_lower(run, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"question": "Why?", "choices": {"text": ["a" * 200, "b"], "label": ["A", "B"]}}) + "\n")
    assert run(data_path=data, max_length=4096).summary["tokens"] == 128


def test_positions_that_a_roberta_keeps_for_padding_are_not_used(run, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"question": "Why?", "choices": {"text": ["a" * 200, "b"], "label": ["A", "B"]}}) + "\n")
    roberta = save_tiny_model(tmp_path / "roberta", "roberta", pad_token_id=1)
    summary = run(model_path=roberta, data_path=data).summary
    assert (summary["tokens"], summary["max_length"], summary["truncated"]) == (126, 126, 1)


def test_a_prompt_of_ones_own_and_a_field_map_are_used(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("{question}?\n")
    (tmp_path / "map.yaml").write_text("question: q\nchoices: {fixed: [a, b]}\n")
    (tmp_path / "own.jsonl").write_text(json.dumps({"q": "abc"}) + "\n")
    options = {"prompt_template": str(tmp_path / "prompt.txt"), "field_map": str(tmp_path / "map.yaml")}
    summary = run(data_path=tmp_path / "own.jsonl", **options).summary
    assert (summary["tokens"], summary["field_map"]) == (4, "map")


def test_output_norms_may_be_taken_after_the_output_projection(run, llama_folder):
    before, after = run().raw, run(out_projection=True).raw
    assert np.array_equal(before["ent"], after["ent"])
    assert np.array_equal(before["task"], after["task"])
    ratio = np.array(after["out"]) / np.array(before["out"])
    model = score_model(llama_folder)
    for layer, row in enumerate(ratio):  # a norm grows by no more than the largest and no less than the least singular value
        weight = model.layers[layer].self_attn.o_proj.weight.detach().double()
        for head, factor in enumerate(row):
            singular = torch.linalg.svdvals(weight[:, head * 12 : head * 12 + 12])
            assert singular[-1] < factor < singular[0]


def score_model(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def test_a_further_score_has_columns_and_a_weight_in_the_fusion(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyonn.heads.score.scores.SCORES", dict(SCORES))
    register_score("peak", lambda seen: seen.mean(seen.outputs.abs().amax(-1)))
    run(extra_weights={"peak": 4.0})
    columns, raw = table(tmp_path / "out" / "scores_raw.csv")
    assert columns == ["layer", "head", "out_raw", "ent_raw", "task_raw", "peak_raw"]
    assert table(tmp_path / "out" / "scores_norm.csv")[0][-1] == "peak_z"
    combined = table(tmp_path / "out" / "scores_combined.csv")[1][:, 2].reshape(3, 4)
    ranks = stats.rankdata(raw[:, 2:].reshape(3, 4, 4), axis=1)
    assert combined.tolist() == (ranks @ np.array([1.0, 0.5, 1.0, 4.0])).tolist()


def test_the_written_configuration_repeats_the_run(run, tmp_path):
    run(max_samples=4, dtype="bf16", extra_weights={}, top_k=2)
    config = ScoreConfig.from_yaml(tmp_path / "out" / "config.yaml", output_dir=str(tmp_path / "again"))
    assert (config.max_samples, config.dtype, config.top_k) == (4, "bf16", 2)
    score_heads(config)
    assert (tmp_path / "again" / "scores_raw.csv").read_bytes() == (tmp_path / "out" / "scores_raw.csv").read_bytes()


def test_the_commented_defaults_are_the_defaults(tmp_path):
    paths = {"model_path": "m", "data_path": "d", "output_dir": "o"}
    path = tmp_path / "score.yaml"
    path.write_text(commented_yaml(ScoreConfig, "Header."))
    assert ScoreConfig.from_yaml(path, **paths) == ScoreConfig(**paths)
    assert set(yaml.safe_load(path.read_text())) == set(vars(ScoreConfig(**paths)))
    with pytest.raises(InputError, match=r"model_path must be given, in .*score.yaml or as --model-path\."):
        ScoreConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 0}, "max_samples must be a whole number of at least 1, got 0."),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True."),
        ({"dtype": "fp64"}, "dtype must be one of auto, fp32, bf16, fp16, got 'fp64'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'."),
        ({"score_query_mode": "last"}, "score_query_mode must be one of last_token, all_tokens, got 'last'"),
        ({"norm_mode": "z"}, "norm_mode must be one of zscore, percentile, got 'z'"),
        ({"lambda_ent": -1}, "lambda_ent must be at least 0 and at most 1,000,000, got -1."),
        ({"lambda_task": float("nan")}, "lambda_task must be at least 0 and at most 1,000,000, got nan."),
        ({"extra_weights": {"peak": -1}}, "extra_weights must map names of scores to numbers from 0 to 1,000,000, got {'peak': -1}."),
        ({"extra_weights": {"peak": 10**400}}, "extra_weights must map names of scores to numbers from 0 to 1,000,000, got {'peak': 1000"),
        ({"lambda_ent": 1e308}, "lambda_ent must be at least 0 and at most 1,000,000, got 1e+308."),
        ({"lambda_task": 10**400}, "lambda_task must be a number that a float holds, got 1000"),
        ({"max_length": 10**20}, "max_length must be at most 2147483647, got 100000000000000000000."),
        ({"batch_size": 10**400}, "batch_size must be at most 2147483647, got 1000"),
        ({"seed": 2**63}, "seed must be at most 9223372036854775807, got 9223372036854775808."),
        ({"extra_weights": ["peak"]}, "extra_weights must map names of scores to numbers from 0 to 1,000,000, got ['peak']."),
        ({"out_projection": 1}, "out_projection must be true or false, got 1."),
        ({"data_path": ""}, "data_path must be a non-empty string, got ''."),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ScoreConfig(**{"model_path": "m", "data_path": "d", "output_dir": "o", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 8}, r"max_samples must be at most the 7 rows of .*data.jsonl, got 8\."),
        ({"max_length": 12}, r"max_length must leave at least one question whole, got 12, which leaves none of 7; raise it"),
        ({"max_length": 4096, "prompt_template": "{long}"}, r"max_length must .*, got 4096, of which the model takes no more than \d+,"),
        ({"model_path": "/nowhere"}, r"model_path must be an existing folder or a hub id, got /nowhere\."),
        ({"prompt_template": "/nowhere"}, "prompt_template must be a readable file, got /nowhere"),
        ({"extra_weights": {"peak": 1.0}}, "extra_weights must name registered extra scores"),
    ],
)
def test_a_failed_run_says_why_in_its_log_and_leaves_no_other_file(run, tmp_path, options, message):
    (tmp_path / "long.txt").write_text("x" * 5000 + " {question}")
    given = {name: value.format(long=tmp_path / "long.txt") if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(InputError, match=message):
        run(**given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.log"]
    last = (tmp_path / "out" / "run.log").read_text().splitlines()[-1]
    assert re.search(f"Z failed: InputError: {message}", last)


def test_scores_that_are_not_finite_say_what_to_change(run, tmp_path):
    folder = save_tiny_model(tmp_path / "huge")
    model = score_model(folder)
    model.layers[1].self_attn.v_proj.weight.data.mul_(1e6)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"score out must be finite, got \w+ for head 0 of layer 1 in float16; use dtype bf16 or fp32"):
        run(model_path=folder, dtype="fp16")
    run(model_path=folder, dtype="fp32")


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    folder = save_tiny_model(tmp_path / "small", vocab_size=60)
    with pytest.raises(
        InputError, match=r"model_path must hold a tokenizer of the model's 60 tokens, got .*, whose tokenizer has the token id 9\d\."
    ):
        run(model_path=folder)


def test_a_model_of_images_is_refused_by_what_it_lacks(run, llama_folder, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    for path in llama_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "vit")
    with pytest.raises(InputError, match=r"^model"):
        run(model_path=tmp_path / "vit")


@pytest.mark.parametrize("embeddings", [None, torch.nn.Conv2d(3, 48, 16)], ids=["not told", "of images"])
def test_a_model_without_embeddings_of_tokens_is_refused(run, monkeypatch, embeddings):
    def get(model: Any) -> Any:
        if embeddings is None:
            raise NotImplementedError
        return embeddings

    monkeypatch.setattr("transformers.LlamaModel.get_input_embeddings", get)
    with pytest.raises(InputError, match=r"model_path must hold a model that reads tokens, got LlamaModel, which has no embeddings"):
        run()
