"""What the page of a score run says of itself: counts, options, the model."""

from __future__ import annotations

import json

import pytest
import yaml

from tinyonn.errors import InputError
from tinyonn.report import write_scores_page


def test_the_output_norm_is_described_as_the_run_took_it(make_scores, parse):
    folder = make_scores()[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    legends = []
    for projected in (False, True):
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"out_projection": projected}))
        legends.append(parse(write_scores_page(folder, figures_too=False).html).text)
    before, after = "of what the output projection takes in, before the projection", "of what the output projection makes of its slice"
    assert [(before in text, after in text) for text in legends] == [(True, False), (False, True)]


def test_the_combined_score_is_described_by_its_weights(make_scores, parse):
    text = parse(write_scores_page(make_scores(extra=True)[0], figures_too=False).html).text
    assert "rank(out) + 0.5·rank(ent) + 1·rank(task) + 0.25·rank(peak): a head's ranks within its layer" in text
    assert "agree" not in text


def test_options_that_a_page_needs_are_asked_for_by_name(make_scores):
    folder = make_scores()[0]
    (folder / "config.yaml").write_text("norm_mode: zscore\nlambda_ent: 0.5\n")
    with pytest.raises(InputError, match=r"config\.yaml must have out_projection, extra_weights, lambda_task, got none of them; run"):
        write_scores_page(folder, figures_too=False)


def test_counts_of_a_score_run_say_what_they_count(make_scores, parse):
    folder = make_scores()[0]
    (folder / "summary.json").write_text(json.dumps({"model": "tiny", "rows": 1221, "samples": 32, "answered": 31, "spans_lost": 2}))
    text = parse(write_scores_page(folder, figures_too=False).html).text
    assert "of these, with an answer key31" in text
    assert "prompts without their whole question2" in text


@pytest.mark.parametrize(
    ("model", "path", "title"),
    [
        ("ckpt_final", "study/boolq/seed42/ckpt_final", "boolq/seed42/ckpt_final"),
        ("checkpoint-500", "/runs/qwen/checkpoint-500", "runs/qwen/checkpoint-500"),
        ("ckpt_init", "ckpt_init", "ckpt_init"),
        ("org/model-7b", "org/model-7b", "model-7b"),
        ("all-MiniLM-L6-v2", "/root/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
    ],
)
def test_a_checkpoint_is_titled_by_more_than_its_last_folder(model, path, title, make_scores, parse):
    folder = make_scores()[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model_path": path}))
    (folder / "summary.json").write_text(json.dumps({"model": model}))
    page = write_scores_page(folder, figures_too=False).html.read_text(encoding="utf-8")
    assert f"<h1>Attention heads of {title}</h1>" in page
