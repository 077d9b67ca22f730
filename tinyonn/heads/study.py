"""Names of commands, files and columns that the head laboratory, its pages and the command line share."""

from __future__ import annotations

TRAIN_STEP, MEASURE_STEP, REPORT_STEP = (f"tinyonn heads plasticity {step}" for step in ("train", "measure", "report"))
TRAIN_AGAIN, MEASURE_AGAIN = f"{TRAIN_STEP} --overwrite", f"{MEASURE_STEP} --overwrite"

# Files of OUTPUT/TASK/seedN, in the order in which the steps write them.
INIT, FINAL, OPTIONS, STATE, TRAINED = "ckpt_init", "ckpt_final", "train_config.yaml", "train_state.pt", "train.json"

SUBSET, PARTS, MEASURED = "eval_subset.json", "measure_parts.json", "measure.json"
IMPORTANCE_PRE, IMPORTANCE_POST = "importance_pre.jsonl", "importance_post.jsonl"
GRADIENTS, UPDATE = "gradfisher_pre.jsonl", "update.jsonl"

HEADS, CASES, STATS = "heads.csv", "cases.json", "stats.json"
FIG_UPDATE, FIG_GRADIENT, FIG_STATS = "fig_I_vs_U.png", "fig_I_vs_G.png", "fig_stats.png"
MAP_FILES = {column: f"map_{column}.png" for column in ("I_pre", "I_post", "Urel")}
PAGE = "index.html"

# Options that earlier versions lack -> value with the behaviour of those versions.
ADDED_OPTIONS = {"skip_unlabelled": False}

# Normalisation of scores_norm.csv -> suffix of its columns.
NORM_COLUMNS = {"zscore": "z", "percentile": "percentile"}

# Files that later steps make from a training, and that are invalid beside another. Files that mark a step as complete come first.
LATER = (
    *(MEASURED, PARTS, STATS, SUBSET, IMPORTANCE_PRE, IMPORTANCE_POST, GRADIENTS, UPDATE, HEADS, CASES),
    *(FIG_UPDATE, FIG_GRADIENT, FIG_STATS, *MAP_FILES.values(), PAGE),
)

# Files of OUTPUT/TASK over all seeds, beside a page.
AGGREGATE, AGGREGATE_TABLE = "aggregate.json", "aggregate.csv"
