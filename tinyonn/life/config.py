"""Options of `tinyonn train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .._io.config import DTYPE, dtype_name
from .._io.options import MAX_SEED, REQUIRED, Options, device_name, integer, non_empty, number, one_of, option, true_or_false
from ..errors import InputError
from ..store.keep import Keep

SIZES = ("1m", "10m", "100m")
SCHEDULES = ("constant", "linear", "cosine")
ATTENTION = ("dyn_nsa", "dyn_smha", "full")


def kept_steps(value: Any, name: str) -> str:
    """A check: a text that `Keep.parse` understands."""
    return str(Keep.parse(value))


@dataclass(frozen=True)
class LifeConfig(Options):
    """Options of a life: a model, its texts, its training.

    Args:
        data_path: a text file, a folder of text files, or records in JSON lines, a JSON list or Parquet, each with a text or a chat.
        output_dir: folder of the model, its log and its page; a training that was interrupted there goes on.
        suffix: file name suffix of the texts in a folder, such as .py.
        text_field: field of the records that has the text.
        size: named size of the model, bonsai-1m, bonsai-10m or bonsai-100m without "bonsai-".
        attention: kind of attention: dyn_nsa, sparse with a learned number of key blocks; dyn_smha, heads as experts; or full.
        hidden_size: features of a token, a multiple of head_dim.
        head_dim: features of an attention head and neurons of an expert.
        init_num_experts: experts of a layer that are live at first.
        max_num_experts: allocated experts of a layer, up to which it can grow.
        vocab_size: tokens of the vocabulary, which is learned from the texts.
        alpha: how fast predictive integrity falls with loss and surprise.
        gamma: share of the surprise in predictive integrity, the rest being the loss.
        pruning_threshold: share of the tokens below which an expert is recycled.
        growth_threshold: share of tokens that no expert serves, above which an expert is born.
        w_ce: weight of the routers' loss towards the expert with the least surprise; 0 for none.
        w_kl: weight of the routers' loss towards the distribution of surprise; 0 for none.
        drive_weights: multiply w_ce and w_kl by the regeneration rate, so that routers learn less where the model predicts well.
        steps: steps of the optimiser over the whole life.
        batch_size: sequences in a step, of each process.
        context: tokens of a sequence.
        learning_rate: learning rate, the highest of its schedule.
        schedule: the learning rate after the warm-up: constant; or linear or cosine, which fall to 0 at the last step.
        warmup_steps: steps in which the learning rate rises from 0; in a fork with another rate or schedule, counted from the fork.
        weight_decay: weight decay of matrices.
        freeze_idle: leave experts without a gradient as they are; otherwise momentum and weight decay move them in every step.
        max_grad_norm: norm to which gradients are clipped.
        gradient_checkpointing: compute layers again in backward, which takes less memory and more time.
        eval_steps: steps between two evaluations on held-out text.
        eval_size: held-out sequences.
        log_steps: steps between two lines of the log, and two updates of the page.
        save_steps: steps between two saves, from which a training that was interrupted goes on; a save writes what changed.
        keep: saved steps that can be restored: the last n, multiples of n, the n with the highest integrity; or all.
        max_bad_steps: steps with a loss that is not finite, in a row, after which training stops; each is skipped.
        seed: seed of the weights, the order of the texts, and new experts.
        dtype: precision of matrix products: auto (bf16, else fp16, on a GPU; fp32 on a CPU), fp32, bf16 or fp16. Weights and optimiser are
            always fp32.
        device: device of the model: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.
        fsdp: shard the model over the GPUs of several processes that torchrun started (FSDP2); otherwise each has it whole (DDP).

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    data_path: str = option(REQUIRED, non_empty, "PATH", "-d", section="Paths")
    output_dir: str = option("data/life", non_empty, "DIR", "-o", "--output")
    suffix: str | None = option(None, non_empty, "TEXT", unset="every file that is text")
    text_field: str = option("text", non_empty, "NAME")
    size: str = option("1m", one_of(*SIZES), section="Model")
    attention: str = option("dyn_nsa", one_of(*ATTENTION))
    hidden_size: int | None = option(None, integer(2), "N", unset="that of the size")
    head_dim: int | None = option(None, integer(2), "N", unset="that of the size")
    init_num_experts: int | None = option(None, integer(1), "N", unset="seven eighths of max_num_experts")
    max_num_experts: int | None = option(None, integer(1), "N", unset="that of the size")
    vocab_size: int | None = option(None, integer(260), "N", unset="that of the size")
    alpha: float = option(1.0, number(minimum=0), "X", section="Integrity and experts")
    gamma: float = option(0.5, number(minimum=0, maximum=1), "X")
    pruning_threshold: float = option(0.005, number(minimum=0, maximum=1), "X")
    growth_threshold: float = option(0.05, number(minimum=0, maximum=1), "X")
    w_ce: float = option(0.0, number(minimum=0), "X")
    w_kl: float = option(0.0, number(minimum=0), "X")
    drive_weights: bool = option(False, true_or_false)
    steps: int = option(2000, integer(1), "N", section="Training")
    batch_size: int = option(8, integer(1), "N")
    context: int = option(256, integer(8), "N")
    learning_rate: float = option(1e-3, number(above=0, maximum=1), "X")
    schedule: str = option("constant", one_of(*SCHEDULES))
    warmup_steps: int = option(0, integer(0), "N")
    weight_decay: float = option(0.1, number(minimum=0, maximum=1), "X")
    freeze_idle: bool = option(True, true_or_false)
    max_grad_norm: float = option(1.0, number(above=0), "X")
    gradient_checkpointing: bool = option(False, true_or_false)
    eval_steps: int = option(200, integer(1), "N")
    eval_size: int = option(32, integer(1), "N")
    log_steps: int = option(20, integer(1), "N")
    save_steps: int = option(1, integer(1), "N")
    keep: str = option("last:3,every:1000,best:1", kept_steps, "last:N,every:N,best:N")
    max_bad_steps: int = option(10, integer(1), "N")
    seed: int = option(0, integer(0, MAX_SEED), "N", section="Machine")
    dtype: str = option("auto", dtype_name, DTYPE)
    device: str = option("auto", device_name, "NAME")
    fsdp: bool = option(False, true_or_false)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drive_weights and not (self.w_ce or self.w_kl):
            raise InputError("drive_weights must be false where w_ce and w_kl are 0, got true.")
        given = (self.init_num_experts, self.max_num_experts)
        if None not in given and self.init_num_experts > self.max_num_experts:  # type: ignore[operator]
            raise InputError(f"init_num_experts must be at most max_num_experts {self.max_num_experts}, got {self.init_num_experts}.")
