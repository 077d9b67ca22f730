"""What the tests of the head laboratory share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.training import train
from tinyonn.heads.progress import Progress
from tinyonn.heads.score.config import ScoreConfig
from tinyonn.heads.score.score import ScoreResult, score_heads
from tinyonn.testing import save_tiny_model, tiny_causal_lm, tiny_encoder

WIDE = {"num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 48}
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "deberta-v2")


@pytest.fixture
def tiny_classifier() -> Callable[..., PreTrainedModel]:
    """`tiny_classifier(arch, dtype=torch.float32, labels=3, **overrides)`: a random classifier of sequences, in eval mode."""

    def make(arch: str, *, dtype: torch.dtype = torch.float32, labels: int = 3, **overrides: Any) -> PreTrainedModel:
        if arch in ENCODERS:
            return tiny_encoder(arch, dtype=dtype, num_labels=labels, **overrides)
        causal = tiny_causal_lm(arch, dtype=dtype, num_labels=labels, pad_token_id=95, **overrides)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(causal.config).to(dtype).eval()
        model.base_model.load_state_dict(causal.base_model.state_dict())
        return model

    return make


@pytest.fixture
def labelled_batches() -> Callable[..., list[dict[str, Tensor]]]:
    """`labelled_batches(sizes=(3, 2), length=11)`: batches of padded sequences of unlike length with labels 0 … 2."""

    def make(sizes: tuple[int, ...] = (3, 2), length: int = 11) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        batches = []
        for size in sizes:
            ids = torch.randint(0, 93, (size, length), generator=generator)
            mask = torch.ones(size, length, dtype=torch.long)
            for row in range(1, size):
                ids[row, length - 2 * row :], mask[row, length - 2 * row :] = 95, 0
            labels = torch.randint(0, 3, (size,), generator=generator)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return batches

    return make


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-bert", "bert", initializer_range=0.1)


@pytest.fixture(scope="module")
def boolq_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions out of three are answered by their first letter; all texts are different and of unlike length."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(60):
            record = {"question": f"{'xyz'[n % 3] * 4} {n}", "passage": "ab" * (n % 5), "answer": n % 3 == 0}
            file.write(f"{json.dumps(record)}\n")
    return folder / "rows.jsonl"


@pytest.fixture
def config(bert_folder: Path, boolq_rows: Path, tmp_path: Path) -> Callable[..., PlasticityConfig]:
    """`config(**options)`: of a training of ten steps in a folder of this test's own."""

    def make(**options: Any) -> PlasticityConfig:
        given = {
            "model_path": str(bert_folder),
            "task": "boolq",
            "data_path": str(boolq_rows),
            "output_dir": str(tmp_path / "out"),
            "device": "cpu",
        }
        small = {"eval_size": 20, "max_length": 32, "batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "checkpoint_steps": 2}
        return PlasticityConfig(**{**given, **small, **options})

    return make


@pytest.fixture(scope="module")
def study_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for n in range(40):
            record = {"question": f"{'xyz'[n % 3] * 4} {n}", "passage": "ab" * (n % 7), "answer": n % 3 == 0}
            file.write(f"{json.dumps(record)}\n")
    return path


@pytest.fixture(scope="module")
def trained(study_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PlasticityConfig]:
    """`trained(arch)`: the configuration of a training that is complete; one for each architecture."""
    made: dict[str, PlasticityConfig] = {}

    def make(arch: str = "bert", **sizes: Any) -> PlasticityConfig:
        if arch not in made:
            model = save_tiny_model(tmp_path_factory.mktemp("model") / arch, arch, initializer_range=0.1, **sizes)
            made[arch] = PlasticityConfig(
                model_path=str(model),
                task="boolq",
                data_path=str(study_rows),
                output_dir=str(tmp_path_factory.mktemp("trained")),
                device="cpu",
                eval_size=12,
                max_length=32,
                batch_size=5,
                max_steps=4,
                learning_rate=3e-3,
            )
            train(made[arch])
        return made[arch]

    return make


@pytest.fixture
def study(trained: Callable[..., PlasticityConfig], tmp_path: Path) -> Callable[..., PlasticityConfig]:
    """`study(arch, name, **options)`: a copy of that training in a folder of this test's own."""

    def make(arch: str = "bert", name: str = "out", **options: Any) -> PlasticityConfig:
        source = trained(arch, **(WIDE if arch == "deberta-v2" else {}))
        values = {**vars(source), "output_dir": str(tmp_path / name), **options}
        config = PlasticityConfig(**values)
        if not config.folder.exists():
            shutil.copytree(source.folder, config.folder)
        return config

    return make


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def question_sizes() -> list[int]:
    """Of each question that `score_run` reads, in characters: the model's tokens."""
    return [12, 40, 3, 25, 8, 31, 17]


@pytest.fixture
def score_run(llama_folder: Path, question_sizes: list[int], tmp_path: Path) -> Callable[..., ScoreResult]:
    """`score_run(progress=None, **options)`: of a ScoreConfig, with a tiny Llama, seven questions and the folder out."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i}" * size, "choices": {"text": ["yes", "no"], "label": ["A", "B"]}} for i, size in enumerate(question_sizes)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def score(progress: Callable[[Progress], None] | None = None, **options: Any) -> ScoreResult:
        given = {"model_path": llama_folder, "data_path": data, "output_dir": tmp_path / "out", "device": "cpu", **options}
        return score_heads(ScoreConfig(**given), progress)

    return score
