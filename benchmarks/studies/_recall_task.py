"""The task of the study of recall: text with facts and questions scattered in it, and the model that learns it.

A fact is one token that holds a key and a value. A question is the token of a key; what is to be predicted there is the value that most
facts of this key hold. A row has one key of each demand, whose facts lie in 1, 2, 4 or 8 blocks.

B batch, T tokens of a row
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from _study import module_text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DEMANDS = (1, 2, 4, 8)
TRUE = {1: 1, 2: 2, 4: 2, 8: 4}  # facts of a key that hold the value that is asked for; each of the others holds another one
KEYS, VALUES = 8, 5  # that there are
FACT, QUESTION, ANSWER = 128, 128 + KEYS * VALUES, 128 + KEYS * VALUES + KEYS  # first tokens of a kind; text is below them
VOCABULARY = ANSWER + VALUES
IGNORED = -100
FORCED = 3  # key blocks that every query reads: the first, the previous and its own
TRAINING = (
    "ast.py", "calendar.py", "cmd.py", "codecs.py", "configparser.py", "copy.py", "csv.py", "datetime.py", "dataclasses.py", "difflib.py",
    "doctest.py", "enum.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "imaplib.py", "inspect.py",
    "locale.py", "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pathlib.py", "pdb.py", "pickle.py", "platform.py", "random.py",
)  # fmt: skip
EVALUATION = ("argparse.py", "statistics.py", "ipaddress.py", "zipfile.py", "tarfile.py", "typing.py")


@dataclass
class Settings:
    tokens: int = 1024
    block: int = 16
    width: int = 208
    layers: int = 2
    batch: int = 4  # rows of a step
    short: int = 256  # tokens of the first rows, of which a step has more
    steps: int = 800
    dense_share: float = 0.4  # of the steps, with plain attention
    short_share: float = 0.25  # of the steps, with short rows
    rate: float = 2e-3
    answer_weight: float = 2.0  # of the answers in the loss
    parts_rate: float = 1e-3  # of gates and compression
    threshold_rate: float = 0.03
    top_n: int = 5
    distil_steps: int = 150
    again_every: int = 100  # steps after which compressed keys are distilled again
    again_steps: int = 20
    rows: int = 32  # of an evaluation
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def asked(self) -> int:
        """Questions about a key."""
        return self.tokens // 32

    @property
    def dense_steps(self) -> int:
        return round(self.steps * self.dense_share)

    @property
    def target(self) -> float:
        """Mean key blocks per query that a static top-n reads."""
        blocks = self.tokens // self.block
        return sum(min(block + 1, self.top_n) for block in range(blocks)) / blocks


class Rows:
    """Rows of the task, drawn by seed: token ids, labels of text, labels of answers and the demand of each answer, (B, T) each."""

    def __init__(self, settings: Settings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.text = torch.tensor([ord(c) for name in names for c in module_text(name) if ord(c) < 128])

    def draw(self, seed: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = zip(*(self._row(random.Random(f"{seed} {row}")) for row in range(batch)), strict=True)
        ids, text, answers, demand = (torch.stack(part) for part in parts)
        return ids, text, answers, demand

    def _row(self, draw: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, block, asked = self.settings.tokens, self.settings.block, self.settings.asked
        facts_end, questions = tokens * 5 // 8, tokens * 11 // 16
        placed: dict[int, int] = {}  # tokens of the task by position
        free = {at: draw.sample(range(at * block, (at + 1) * block), block) for at in range(1, facts_end // block)}
        asked_at = draw.sample(range(questions, tokens), len(DEMANDS) * asked)
        answers, demands = torch.full((tokens,), IGNORED), torch.zeros(tokens, dtype=torch.int64)
        for number, (demand, key) in enumerate(zip(DEMANDS, draw.sample(range(KEYS), len(DEMANDS)), strict=True)):
            value, *others = draw.sample(range(VALUES), 1 + demand - TRUE[demand])
            blocks = draw.sample([at for at, left in free.items() if len(left) > block // 2], demand)
            for at, held in zip(blocks, [value] * TRUE[demand] + others, strict=True):
                placed[free[at].pop()] = FACT + key * VALUES + held
            for at in asked_at[number * asked : (number + 1) * asked]:
                placed[at], answers[at], demands[at] = QUESTION + key, ANSWER + value, demand
        begin = draw.randrange(len(self.text) - tokens)
        where = torch.tensor(list(placed))
        ids, free_of_facts = torch.empty(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
        free_of_facts[where] = False
        ids[free_of_facts] = self.text[begin : begin + tokens - len(placed)]  # no character is lost to a fact
        ids[where] = torch.tensor(list(placed.values()))
        text = torch.full((tokens,), IGNORED)
        text[:-1] = torch.where((ids[1:] < FACT) & (answers[:-1] == IGNORED), ids[1:], IGNORED)
        return ids, text, answers, demands


def new_model(settings: Settings, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=settings.width, intermediate_size=settings.width * 7 // 2, num_hidden_layers=settings.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=settings.tokens,
        initializer_range=settings.width**-0.5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)
