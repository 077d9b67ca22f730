"""Head laboratory: scores of attention heads before fine-tuning, and the effects of fine-tuning on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .capture.attention import capture_attention_stats as capture_attention_stats
    from .capture.gates import head_gates as head_gates
    from .capture.layers import AttentionLayer as AttentionLayer
    from .capture.layers import attention_layers as attention_layers
    from .plasticity.ablation import HeadAblation as HeadAblation
    from .plasticity.ablation import TaylorImportance as TaylorImportance
    from .plasticity.ablation import ablate_heads as ablate_heads
    from .plasticity.ablation import taylor_importance as taylor_importance
    from .plasticity.config import PlasticityConfig as PlasticityConfig
    from .plasticity.gradients import head_gradients as head_gradients
    from .plasticity.head_update import checkpoint_update as checkpoint_update
    from .plasticity.measurement import measure as measure
    from .plasticity.seeds import aggregate as aggregate
    from .plasticity.summary import summarise as summarise
    from .plasticity.training import train as train
    from .progress import Progress as Progress
    from .score.config import ScoreConfig as ScoreConfig
    from .score.score import ScoreResult as ScoreResult
    from .score.score import score_heads as score_heads
    from .score.scores import Observation as Observation
    from .score.scores import register_score as register_score

# Loaded on first access, so that options can be checked, and results read, without torch. No module has the name of a function here.
_HOMES = {
    "AttentionLayer": "capture.layers",
    "HeadAblation": "plasticity.ablation",
    "Observation": "score.scores",
    "PlasticityConfig": "plasticity.config",
    "Progress": "progress",
    "ScoreConfig": "score.config",
    "ScoreResult": "score.score",
    "TaylorImportance": "plasticity.ablation",
    "ablate_heads": "plasticity.ablation",
    "aggregate": "plasticity.seeds",
    "attention_layers": "capture.layers",
    "capture_attention_stats": "capture.attention",
    "checkpoint_update": "plasticity.head_update",
    "head_gates": "capture.gates",
    "head_gradients": "plasticity.gradients",
    "measure": "plasticity.measurement",
    "register_score": "score.scores",
    "score_heads": "score.score",
    "summarise": "plasticity.summary",
    "taylor_importance": "plasticity.ablation",
    "train": "plasticity.training",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
