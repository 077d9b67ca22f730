"""ARC: tasks and their augmentations, tokens for any causal language model, generated tasks, and ARC Prize's submissions."""

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
    from .families import FAMILIES as FAMILIES
    from .families import generate as generate
    from .loading import load as load
    from .submission import check_submission as check_submission
    from .submission import write_submission as write_submission
    from .tasks import Pair as Pair
    from .tasks import Task as Task
    from .tokens import Decoded as Decoded
    from .tokens import Example as Example
    from .tokens import Fitting as Fitting
    from .tokens import Vocabulary as Vocabulary
    from .tokens import fit_context as fit_context

# Loaded on first access, so that tasks can be read and checked without torch.
_HOMES = {
    "Augmentation": "augmentations",
    "views": "augmentations",
    "TaskBatches": "batches",
    "coordinates": "batches",
    "pad_examples": "batches",
    "pad_prompts": "batches",
    "FAMILIES": "families",
    "generate": "families",
    "load": "loading",
    "check_submission": "submission",
    "write_submission": "submission",
    "Pair": "tasks",
    "Task": "tasks",
    "Decoded": "tokens",
    "Example": "tokens",
    "Fitting": "tokens",
    "Vocabulary": "tokens",
    "fit_context": "tokens",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
