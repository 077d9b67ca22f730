"""The head laboratory: attention heads scored before fine-tuning, and what fine-tuning does to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .ablation import HeadAblation as HeadAblation
    from .ablation import TaylorImportance as TaylorImportance
    from .ablation import ablate_heads as ablate_heads
    from .ablation import taylor_importance as taylor_importance
    from .capture import capture_attention_stats as capture_attention_stats
    from .gates import head_gates as head_gates
    from .gradients import head_gradients as head_gradients
    from .head_update import checkpoint_update as checkpoint_update
    from .layers import AttentionLayer as AttentionLayer
    from .layers import attention_layers as attention_layers
    from .measurement import measure as measure
    from .plasticity_config import PlasticityConfig as PlasticityConfig
    from .progress import Progress as Progress
    from .score import ScoreResult as ScoreResult
    from .score import score_heads as score_heads
    from .score_config import ScoreConfig as ScoreConfig
    from .scores import Observation as Observation
    from .scores import register_score as register_score
    from .seeds import aggregate as aggregate
    from .summary import summarise as summarise
    from .training import train as train

# Loaded when asked for: options can be checked, and results read, without torch. No module bears the name of a function here.
_HOMES = {
    "AttentionLayer": "layers",
    "HeadAblation": "ablation",
    "Observation": "scores",
    "PlasticityConfig": "plasticity_config",
    "Progress": "progress",
    "ScoreConfig": "score_config",
    "ScoreResult": "score",
    "TaylorImportance": "ablation",
    "ablate_heads": "ablation",
    "aggregate": "seeds",
    "attention_layers": "layers",
    "capture_attention_stats": "capture",
    "checkpoint_update": "head_update",
    "head_gates": "gates",
    "head_gradients": "gradients",
    "measure": "measurement",
    "register_score": "scores",
    "score_heads": "score",
    "summarise": "summary",
    "taylor_importance": "ablation",
    "train": "training",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
