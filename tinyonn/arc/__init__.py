"""ARC: tasks and their augmentations, tokens for any causal language model, generated tasks, evaluation, and ARC Prize's
submissions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .augmentations import Augmentation as Augmentation
    from .augmentations import views as views
    from .batches import TaskBatches as TaskBatches
    from .batches import coordinates as coordinates
    from .batches import pad_examples as pad_examples
    from .batches import pad_prompts as pad_prompts
    from .config import ArcConfig as ArcConfig
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .evaluation_config import ArcEvalConfig as ArcEvalConfig
    from .evaluation_run import evaluate_checkpoint as evaluate_checkpoint
    from .families import FAMILIES as FAMILIES
    from .families import generate as generate
    from .loading import load as load
    from .scoring import answer_log_probs as answer_log_probs
    from .scoring import aug_scores as aug_scores
    from .submission import check_submission as check_submission
    from .submission import write_submission as write_submission
    from .tasks import Pair as Pair
    from .tasks import Task as Task
    from .tokens import Decoded as Decoded
    from .tokens import Example as Example
    from .tokens import Fitting as Fitting
    from .tokens import Vocabulary as Vocabulary
    from .tokens import fit_context as fit_context
    from .training import ArcResult as ArcResult
    from .training import train_arc as train_arc

# Loaded on first access, so that tasks can be read and checked without torch.
_HOMES = {
    "Augmentation": "augmentations",
    "views": "augmentations",
    "TaskBatches": "batches",
    "coordinates": "batches",
    "pad_examples": "batches",
    "pad_prompts": "batches",
    "ArcConfig": "config",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "ArcEvalConfig": "evaluation_config",
    "evaluate_checkpoint": "evaluation_run",
    "FAMILIES": "families",
    "generate": "families",
    "load": "loading",
    "answer_log_probs": "scoring",
    "aug_scores": "scoring",
    "check_submission": "submission",
    "write_submission": "submission",
    "Pair": "tasks",
    "Task": "tasks",
    "Decoded": "tokens",
    "Example": "tokens",
    "Fitting": "tokens",
    "Vocabulary": "tokens",
    "fit_context": "tokens",
    "ArcResult": "training",
    "train_arc": "training",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
