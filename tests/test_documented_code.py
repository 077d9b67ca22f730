"""Every Python block of README, docs and examples/README.md runs: the blocks of a page in order, in one namespace and folder, offline.

The folder holds what pages take for granted: a tiny model under each name that they load one by, texts, questions, and the demo's model
in the cache. `model`, `tokenizer` and a batch are there from the start. Where a `text` block follows a block that prints, it must show
the same words; numbers may differ, for the model is another.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyonn.heads.score import scores
from tinyonn.testing import save_tiny_model, tiny_causal_lm, token_ids

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/README.md"]
    if page.exists()
]
# Python that is shown and not run is marked ```py; first line of the block -> why it cannot run here.
NOT_RUN: dict[str, str] = {
    "# train.py": "docs/distributed.md: a program of several processes, which torchrun starts",
    "# train_ddp.py": "docs/distributed.md: a program of several processes, which torchrun starts",
}
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+) *(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$", re.MULTILINE | re.DOTALL
)
LANGUAGES = {"python", "py", "sh", "text", "json", "yaml", "bibtex", "mermaid", ""}
MODEL_NAME = re.compile(r"""(?:from_pretrained\(|model_path=)\s*["']([^"']+)["']""")
SAVED_NAME = re.compile(r"""(?:save_pretrained|save_model)\(\s*["']([^"']+)["']""")
DATA_NAME = re.compile(r"""(dataset_path|data_path)=["']([^"']+)["']""")


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    shown: str | None  # the output that the page shows below it


def fences(page: Path) -> list[tuple[int, str, str, str]]:
    """(line, language, code, text between it and the fence before) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in FENCE.finditer(text):
        found.append((text.count("\n", 0, match.start()) + 2, match["language"], textwrap.dedent(match["code"]), text[end : match.start()]))
        end = match.end()
    return found


def python_blocks(page: Path) -> list[Block]:
    found = fences(page)
    blocks = []
    for (line, language, code, _), (_, next_language, shown, between) in zip(found, [*found, (0, "", "", "-")][1:], strict=True):
        if language == "python":
            blocks.append(Block(line, code, shown if next_language == "text" and not between.strip() else None))
    return blocks


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_PYTHON = [page for page in PAGES if python_blocks(page)]


def furnish(folder: Path, code: str) -> None:
    """What the page's blocks open, under the names that they use."""
    (folder / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    made = set(SAVED_NAME.findall(code))
    for name in {*MODEL_NAME.findall(code), ".cache/tinyonn/SmolLM2-135M-Instruct-Q4_1-float32"} - made:
        kind = name.lower()
        if "encoder" in kind or "bert" in kind:
            save_tiny_model(folder / name, "bert", num_labels=2)
        else:
            save_tiny_model(folder / name, "qwen3_moe" if "moe" in kind else "llama", max_position_embeddings=4096)
    question = {"question": "Where do cats sleep?", "choices": {"text": ["on mats", "in hats"], "label": ["A", "B"]}, "answerKey": "A"}
    for option, name in DATA_NAME.findall(code):
        row = question if option == "data_path" else {"text": "def add(first, second):\n    return first + second\n"}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps({**row, "id": str(number)}) + "\n" for number in range(8)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))  # what a page registers stays there
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("TINYONN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_blocks_run(page, folder, words_of):
    pytest.importorskip("peft")
    blocks = python_blocks(page)
    furnish(folder, "\n".join(block.code for block in blocks))
    from transformers import AutoTokenizer

    names: dict[str, Any] = {
        "__name__": "__main__",
        "__builtins__": builtins,
        "model": tiny_causal_lm("llama", max_position_embeddings=4096),
        "tokenizer": AutoTokenizer.from_pretrained(".cache/tinyonn/SmolLM2-135M-Instruct-Q4_1-float32"),
        "input_ids": token_ids(),
        "attention_mask": torch.ones_like(token_ids()),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            printed = io.StringIO()
            # The block's lines have the page's numbers, so that a traceback points there.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            if block.shown is not None:
                assert words_of(printed.getvalue()) == words_of(block.shown), f"{name_of(page)}:{block.line} shows another output"


def test_blocks_that_are_not_run_have_a_reason():
    left = set()
    for page in PAGES:
        for line, language, code, _ in fences(page):
            assert language in LANGUAGES, f"{name_of(page)}:{line} has a block of {language!r}: Python is marked python"
            if language == "py":
                left.add(code.split("\n", 1)[0])
    assert left == set(NOT_RUN)
    assert WITH_PYTHON


def test_the_comparison_of_outputs_can_fail(words_of):
    assert words_of("loss 2.31, 12 blocks\n...\nkept 1") == words_of("loss  0.5,   3 blocks\nkept 7\nkept 8")
    assert words_of("tensor([1.0, 2e-05, nan])") == words_of("tensor([-1.5])")
    assert words_of("loss 2.31") != words_of("perplexity 2.31")
