"""The questions of `gpu.py`, in order. This file contains only data.

    oracle   every configuration of every kernel against its float64 oracle; several at a time
    goal     the library's goals for speed and memory, at their real shapes; one at a time
    rest     other speeds, and tests that need a GPU

Seconds are estimates for one H200 with an empty compile cache; they decide which questions still fit. On a CPU, where
kernels run in Triton's interpreter, `tiny` replaces arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = ("oracle", "goal", "rest")


@dataclass(frozen=True)
class Question:
    """One measurement or check.

    Attributes:
        name: unique name; also names the JSON file.
        stage: one of STAGES.
        seconds: estimated duration.
        target: `file.py:function`; the path is relative to the checkout.
        arguments: arguments of the function.
        tiny: replacements for arguments on a CPU; None skips the question there.
        limit: timeout in seconds; None for three times the estimate, at least a minute.
    """

    name: str
    stage: str
    seconds: float
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] | None = None
    limit: float | None = None


_WHOLE = {"compress": 64, "block": 64, "window": 512}
# Same constants as the goals, so that the goals reuse the compiled kernels.
LIKE_THE_GOAL = {"tokens": 1040, "heads": 16, "kv_heads": 1, "dim": 128, "blocks": 8, **_WHOLE}
ODD_PACKED = {"tokens": 907, "heads": 6, "kv_heads": 2, "dim": 40, "compress": 32, "block": 64, "window": 100, "blocks": 5, "packed": True}
RULE = {"importance": "relative", "forced_first": 0, "forced_local": 3}
ONE_HEAD_A_GROUP = {"tokens": 777, "heads": 2, "kv_heads": 2, "dim": 64, "compress": 16, "block": 64, "window": 65, "blocks": 6}
BOUNDED = {"softcap": 3.0, "sinks": True}
DECODING = {"tokens": 601, "heads": 8, "kv_heads": 2, "dim": 64, "queries": 3, "blocks": 5, **_WHOLE}
TINY = {"tokens": 70, "heads": 3, "kv_heads": 1, "dim": 16, "compress": 16, "block": 16, "window": 9, "blocks": 4}
ATTENTION = {
    "like the goal": (LIKE_THE_GOAL, TINY),
    "odd, packed": ({**ODD_PACKED, **RULE}, {**TINY, "tokens": 110, "packed": True, **RULE}),
    "one head a group": ({**ONE_HEAD_A_GROUP, "own_query": True}, {**TINY, "heads": 1, "dim": 17, "own_query": True}),
    "softcap and sinks": ({**ONE_HEAD_A_GROUP, "heads": 6, **BOUNDED}, {**TINY, **BOUNDED}),
    "decoding": (DECODING, {**TINY, "queries": 3}),
}


def _oracle(op: str, label: str, seconds: float, sizes: list[dict[str, Any]], tiny: list[dict[str, Any]]) -> list[Question]:
    return [
        Question(
            f"oracle {op}, {label}{', ' if label else ''}{dtype}".replace(", , ", ", "),
            "oracle",
            seconds,
            "benchmarks/gpu_oracles.py:check",
            {"op": op, "dtype": dtype, "sizes": sizes},
            {"sizes": tiny},
        )
        for dtype in ("bfloat16", "float32")
    ]


def _oracles() -> list[Question]:
    found: list[Question] = []
    for label, (size, tiny) in ATTENTION.items():
        found += _oracle("dyn_nsa", label, 45, [size], [tiny])
    mixture = {"tokens": 500, "features": 1024, "experts": 16, "neurons": 64, "slots": 4}
    odd = {"tokens": 301, "features": 100, "experts": 37, "neurons": 24, "slots": 3}
    tiny_mixture = {"tokens": 9, "features": 16, "experts": 4, "neurons": 8, "slots": 2}
    for label, size, options in (
        ("like the goal", mixture, {}),
        ("odd", odd, {"kind": "expert"}),
        ("gpt-oss", odd, {"layout": "gpt-oss", "kind": "expert"}),
        ("no gate", odd, {"layout": "no gate", "kind": "output"}),
    ):
        found += _oracle("expert_mlp", label, 25, [{**size, **options}], [{**tiny_mixture, **options}])
    linear = {"tokens": 500, "features": 1024, "experts": 16, "outputs": 192, "slots": 4}
    tiny_linear = {"tokens": 9, "features": 16, "experts": 4, "outputs": 8, "slots": 2}
    kinds = [{}, {"rows": "slot", "summed": True}]
    found += _oracle("expert_linear", "", 12, [{**linear, **kind} for kind in kinds], [{**tiny_linear, **kind} for kind in kinds])
    for part, seconds in (("select", 25), ("block_sparse", 25), ("compressed", 20), ("sliding_window", 20)):
        sizes = [ATTENTION[label] for label in ("like the goal", "odd, packed", "one head a group", "softcap and sinks")]
        found += _oracle(part, "", seconds, [size for size, _ in sizes], [TINY])
    heads = {"heads": 6, "kv_heads": 2}
    found += _oracle(
        "attention_stats",
        "",
        20,
        [
            {"tokens": 507, "dim": 64, **heads},
            {"tokens": 301, "dim": 40, **heads, "everything": True},
            {"tokens": 512, "dim": 128, **heads},
        ],
        [{"tokens": 20, "dim": 16, **heads, "everything": True}],
    )
    found += _oracle("block_norms", "", 8, [{"rows": 301, "features": 4160}, {"rows": 7, "features": 100}], [{"rows": 5, "features": 100}])
    found += _oracle(
        "token_grad_norms",
        "",
        8,
        [{"rows": 21, "inputs": 3000, "features": 129}, {"rows": 33, "inputs": 512, "features": 768, "block_size": None}],
        [{"rows": 5, "inputs": 30, "features": 100}],
    )
    found += _oracle(
        "integrate_sps",
        "",
        8,
        [{"tokens": 70, "offsets": [0, 81, 162, 243]}, {"tokens": 41, "offsets": [0, 50, 3000]}],
        [{"tokens": 7, "offsets": [0, 5, 37]}],
    )
    route = [
        {"tokens": 500, "experts": 64, "features": 256, "form": form, "combine": combine}
        for form, combine in (("sigmoid_cosine", "softmax"), ("cosine", "gated"))
    ]
    found += _oracle("threshold_route", "", 5, route, [{**size, "tokens": 20, "experts": 8, "features": 12} for size in route])
    for name in ("block_lists", "expert_sort"):
        found.append(_tests(f"oracle {name}, by its tests", "oracle", 30, [f"tests/kernels/test_{name}.py"], "not slow"))
    found.append(_tests("oracle packed windows, by their tests", "oracle", 25, ["tests/ops/test_packed_windows.py"], "not slow"))
    return found


def _tests(name: str, stage: str, seconds: float, files: list[str], marker: str = "gpu") -> Question:
    return Question(name, stage, seconds, "benchmarks/gpu_worker.py:run_tests", {"files": files, "marker": marker})


_KERNELS = "benchmarks/gpu_kernels.py:"
_LONG = "benchmarks/bench_dyn_nsa_long.py:"
_FULL = {"heads": 64, "kv_heads": 4, "dim": 128, "dtype": "bfloat16", "device": "cuda"}
_TINY_LONG = {"tokens": 320, "heads": 4, "kv_heads": 2, "dim": 16, "dtype": "float32", "device": "cpu"}


def _dense(tokens: int, choices: str, seconds: float, stage: str = "goal", **sizes: Any) -> Question:
    given = {"tokens": tokens, "choices": choices, **_FULL, **sizes}
    name = f"dyn_nsa {tokens // 1024}k, {given['heads']} over {given['kv_heads']} heads, {choices}"
    group = min(4, given["heads"] // given["kv_heads"])
    tiny = {**_TINY_LONG, "heads": 2 * group, "kv_heads": 2}
    return Question(name, stage, seconds, f"{_LONG}against_dense_attention", given, tiny)


def _goals() -> list[Question]:
    mixture, tiny_mixture = [16384, 1024, 1024, 64, 8], [64, 32, 8, 16, 2]
    norms = {"rows": 65536, "features": 8192, "device": "cuda"}
    copy = "benchmarks/bench_block_norms.py:against_copy_bandwidth"
    kernels, tiny_kernels = ({name: x for name, x in one.items() if name != "device"} for one in (_FULL, _TINY_LONG))
    tiny_norms = {"rows": 100, "features": 256, "device": "cpu"}
    return [
        _dense(65536, "random", 40),
        Question(
            "mixture 16k, best forms", "goal", 25, "benchmarks/bench_expert_mlp.py:best_forms", {"sizes": mixture}, {"sizes": tiny_mixture}
        ),
        Question(
            "dyn_nsa 64k, by kernel", "goal", 12, f"{_KERNELS}by_kernel", {"op": "dyn_nsa", "sizes": {"tokens": 65536, **kernels}},
            {"sizes": tiny_kernels},
        ),
        Question(
            "mixture 16k, by kernel", "goal", 8, f"{_KERNELS}by_kernel", {"op": "expert_mlp", "sizes": mixture}, {"sizes": tiny_mixture}
        ),
        _dense(65536, "clustered", 20),
        Question("dyn_nsa 64k, peak memory", "goal", 6, f"{_LONG}peak_memory", {"tokens": 65536, **_FULL}, _TINY_LONG),
        *(
            Question(f"block norms, {dtype}", "goal", 4, copy, {**norms, "dtype": dtype}, tiny_norms)
            for dtype in ("bfloat16", "float32")
        ),
        Question("dyn_nsa 64k, selected branch against fla", "goal", 30, f"{_LONG}selected_branch_against_fla", {"tokens": 65536, **_FULL}),
        Question("dyn_nsa, first use", "goal", 35, f"{_KERNELS}first_use", {}, {}),
        _dense(65536, "threshold", 20),
    ]  # fmt: skip


def _bench(name: str, seconds: float, target: str, arguments: dict[str, Any], tiny: dict[str, Any] | None = None) -> Question:
    return Question(name, "rest", seconds, f"benchmarks/bench_{target}", arguments, tiny)


def _rest() -> list[Question]:
    small = "128 experts of 64"
    return [
        _bench("dyn_nsa, one token over 16k", 8, "dyn_nsa.py:test_decoding", {"tokens": 16384}, {"tokens": 1024}),
        _bench(
            "dynamic heads, 8 of 64, 8k", 20, "dyn_smha.py:test_forward_and_backward", {"size": "64 heads, 8 a token, 8k tokens"},
            {"size": "16 heads, 2 a token, 512 tokens"},
        ),
        _bench("attention_stats, 4k", 6, "attention_stats.py:test_entropy_beside_sdpa_against_eager", {"tokens": 4096}, {"tokens": 64}),
        _bench("token grad norms against the two norms", 5, "token_grad_norms.py:test_against_the_two_norms", {"block_size": 64}),
        _bench("token grad norms against written-out gradients", 5, "token_grad_norms.py:test_against_written_out_gradients", {}),
        _bench("integrate_sps", 5, "integrate_sps.py:test_integrate_sps", {"missing": False}),
        _bench("mixture, 128 experts, all sparse forms", 20, "expert_mlp.py:test_forward_and_backward", {"size": small, "forms": "sparse"}),
        _bench("mixture, memory", 20, "expert_mlp.py:test_memory", {"size": small}),
        *(_bench(f"DynNSA's {part}", 10, "dyn_nsa.py:test_parts", {"part": part}) for part in PARTS),
        _bench("attention module, 4096 tokens", 15, "dyn_nsa.py:test_whole_module", {"tokens": 4096}),
        _bench("dyn_nsa float32, 16k", 15, "dyn_nsa.py:test_forward_and_backward", {"tokens": 16384, "choices": "random"}),
        _bench("surprise", 15, "surprise.py:test_surprise_against_gradients_per_token", {"experts": 128, "neurons": 64, "slots": 4}),
        _bench("training step with routers that learn", 15, "hyper_step.py:test_a_step", {"size": "64 experts of 32"}),
        _bench(
            "step of LazyAdamW, 5 % active", 10, "lazy_adamw.py:test_a_step", {"size": "experts of 128 x 256", "share": "5 % active"},
        ),
        _bench("attention_stats in a model", 15, "attention_stats.py:test_a_model_captured_against_eager", {"tokens": 4096}),
        *(_dense(16384, "random", 35, "rest", heads=heads, kv_heads=kv_heads) for heads, kv_heads in ((16, 16), (24, 8), (32, 4), (96, 4))),
        _dense(8192, "random", 20, "rest"),
        _dense(32768, "random", 25, "rest"),
        *(_tests(f"tests, {file}", "rest", seconds, [f"tests/{file}"]) for file, seconds in GPU_TESTS.items()),
        _bench(
            "mixture 16k, Liger", 240, "expert_mlp.py:best_forms", {"sizes": [16384, 1024, 1024, 64, 8], "liger": True},
            {"sizes": [64, 32, 8, 16, 2]},
        ),
    ]  # fmt: skip


PARTS = ("compressed", "select", "block sparse", "window")
# Test files that need a GPU, and estimated seconds.
GPU_TESTS = {
    "ops/test_statistics_on_gpu.py": 60,
    "ops/test_expert_mlp_triton.py": 40,
    "ops/test_dyn_nsa_triton_memory.py": 40,
    "ops/test_threshold_route.py": 10,
    "train/test_gating_gradients.py": 15,
    "train/test_lazy_adamw.py": 20,
    "heads/test_training_resume.py": 30,
}

QUESTIONS: list[Question] = [
    Question("build the C++ extension", "oracle", 60, "benchmarks/gpu_worker.py:build", {}, {}, limit=300),
    *_oracles(),
    *_goals(),
    *_rest(),
]
