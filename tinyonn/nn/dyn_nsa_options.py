"""Options of a DynNSA layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from ..errors import shown
from ..ops._checks import check_choice, check_flag, check_number, check_size
from ..ops._dispatch import check_impl
from ..ops.nsa._checks import check_max_blocks, check_sizes, check_temperature
from ..ops.nsa.dyn_nsa import Importance

MAX_TEMPERATURE = 10.0  # with a higher one, the gates of an open model would not all be 1
MAX_QUERIES = 65_536  # of a row, in the distillation loss
MAX_THRESHOLD = 1e4  # nats, far beyond every importance; float16 holds it

TauSource = Literal["attention", "output", "constant"]


@dataclass
class DynNSAOptions:
    """Options of a DynNSA layer.

    Attributes:
        compress_size: positions of a compressed key: 16, 32 or 64, dividing block_size.
        block_size: positions of a key block.
        window: keys of the window branch.
        temperature: width of the smooth step above the threshold, in nats; a normal float32 of at most 10.
        max_blocks: maximum key blocks per query, at least the forced ones; None for all blocks.
        forced_first: blocks at the start that every query reads.
        forced_local: blocks that every query reads up to and including its own, at least 1.
        importance: what a threshold is compared with: "share", the log of a block's share of the attention; "relative", the rule of earlier
            versions, against a uniform share.
        detach_scores: whether to stop the gradient through the importance of blocks.
        learnable_compression: whether compression is learned; False for the mean of a block.
        compress_query: whether each query head learns a map of its queries for the compressed branch and the selection.
        start_gates: initial weights of the compressed, selected and window branch.
        base, slope: initial thresholds, in nats, and in nats per unit of tau.
        tau_source: "attention" for the entropy of the compressed branch; "output" for the entropy of the model's output; "constant".
        tau: the constant, in [0, 1].
        budget_weight: weight of the budget loss; 0 for none.
        budget_target: initial target of the budget loss, in key blocks per query; a schedule may change it.
        distil_weight: weight of the distillation loss, which trains the compressed branch to estimate each block's share of the attention;
            0 for none. `hf.distil_compression` does so before training.
        distil_queries: random queries of each row that the distillation loss uses, or of all rows together where sequences are packed.
        prices: pairs of far blocks per query and the price that reads them, from few blocks to many, as `hf.calibrate` found them.
        prices_forced: forced blocks per query in the sample of `prices`, fewer in short texts; None for `forced`, as in earlier versions.
        impl: implementation of `ops.dyn_nsa`.
    """

    compress_size: int = 16
    block_size: int = 64
    window: int = 512
    temperature: float = 1.0
    max_blocks: int | None = 32
    forced_first: int = 1
    forced_local: int = 2
    importance: Importance = "share"
    detach_scores: bool = False
    learnable_compression: bool = True
    compress_query: bool = True
    start_gates: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    base: float = 0.0
    slope: float = 0.0
    tau_source: TauSource = "attention"
    tau: float = 0.5
    budget_weight: float = 0.0
    budget_target: float = 16.0
    distil_weight: float = 0.0
    distil_queries: int = 16
    prices: tuple[tuple[float, float], ...] = ()
    prices_forced: float | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("base", "slope"):
            check_number(name, getattr(self, name), at_least=-MAX_THRESHOLD, at_most=MAX_THRESHOLD)
        check_number("tau", self.tau)
        check_number("temperature", self.temperature, above=0, at_most=MAX_TEMPERATURE)
        check_number("budget_weight", self.budget_weight, at_least=0)
        check_number("budget_target", self.budget_target, above=0)
        check_number("distil_weight", self.distil_weight, at_least=0)
        check_size("distil_queries", self.distil_queries)
        if self.distil_queries > MAX_QUERIES:
            raise ValueError(f"distil_queries must be at most {MAX_QUERIES:,}, got {self.distil_queries}.")
        for name in ("detach_scores", "learnable_compression", "compress_query"):
            check_flag(name, getattr(self, name))
        if self.distil_weight and not (self.learnable_compression or self.compress_query):
            raise ValueError(f"distil_weight must be 0 without learnable_compression or compress_query, got {self.distil_weight}.")
        if not isinstance(self.start_gates, (list, tuple)):
            raise TypeError(f"start_gates must be a tuple of 3 numbers, got {type(self.start_gates).__name__}.")
        for gate in self.start_gates:
            if isinstance(gate, bool) or not isinstance(gate, (int, float)):
                raise TypeError(f"start_gates must be 3 numbers, got {type(gate).__name__} among them.")
            check_number("start_gates", gate)
        check_sizes(self.block_size, self.compress_size)
        check_size("window", self.window)
        check_temperature(self.temperature)
        check_choice("importance", self.importance, get_args(Importance))
        check_size("forced_first", self.forced_first, 0)
        check_size("forced_local", self.forced_local)
        if self.max_blocks is not None:
            check_max_blocks(self.max_blocks, self.forced_first, self.forced_local)
        check_impl(self.impl)
        self.prices = _checked_prices(self.prices)
        if self.prices_forced is not None:
            check_number("prices_forced", self.prices_forced, at_least=0, at_most=self.forced)
        self.start_gates = tuple(self.start_gates)  # type: ignore[assignment]  # JSON gives a list
        check_choice("tau_source", self.tau_source, get_args(TauSource))
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}.")
        if len(self.start_gates) != 3:
            raise ValueError(f"start_gates must have 3 weights, got {len(self.start_gates)}.")

    @property
    def forced(self) -> int:
        """Blocks that a query reads whatever the thresholds, where there are so many."""
        return self.forced_first + self.forced_local


def _checked_prices(prices: Any) -> tuple[tuple[float, float], ...]:
    """Pairs as tuples; JSON gives lists."""
    if not isinstance(prices, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in prices):
        raise TypeError(f"prices must be pairs of two numbers, got {shown(prices)}.")
    for far, price in prices:
        check_number("prices", far, above=0)
        check_number("prices", price)
    for (few, high), (many, low) in pairwise(prices):
        if many < few or low > high:
            raise ValueError(
                f"prices must go from few blocks to many and from high prices to low ones, got {(few, high)} before {(many, low)}."
            )
    return tuple((far, price) for far, price in prices)
