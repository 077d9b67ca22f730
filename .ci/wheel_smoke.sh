#!/usr/bin/env bash
# An installed wheel, with no checkout around: it imports, its commands run, and it scans a tiny model.
set -euo pipefail
bin=$1
export PYTHONSAFEPATH=1
"$bin/python" - <<'EOF'
import tinyonn, tinyonn._C, tinyonn.ops, tinyonn_kernels
from tinyonn.testing import save_tiny_model

assert "site-packages" in tinyonn.__file__, tinyonn.__file__
assert "site-packages" in tinyonn_kernels.__file__, tinyonn_kernels.__file__
save_tiny_model("tiny-llama", "llama")
with open("words_corpus.jsonl", "w") as file:
    for i in range(4):
        file.write('{"text": "the cat sat on mat number %d and then it slept"}\n' % i)
save_tiny_model("tiny-bert", "bert")
with open("questions.jsonl", "w") as file:
    for i in range(4):
        file.write('{"question": "where do %d cats sit?", "options": "A. mat\\nB. hat", "answer": "A. mat"}\n' % i)
with open("passages.jsonl", "w") as file:
    for i in range(12):
        file.write('{"question": "is %d odd", "passage": "%s", "answer": %s}\n' % (i, ["no", "yes"][i % 2], ["false", "true"][i % 2]))
EOF
"$bin/tinyonn" --version
"$bin/tinyonn" doctor
"$bin/tinyonn" scan --model-path tiny-llama --dataset-path words_corpus.jsonl --output-path words.mscan
"$bin/tinyonn" verify words.mscan
"$bin/tinyonn" info words.mscan
"$bin/tinyonn" report words.mscan -o words.html
test -s words.html
"$bin/tinyonn" heads score --model-path tiny-llama --data-path questions.jsonl --output-dir scores
test -s scores/index.html
"$bin/tinyonn" heads plasticity train --model-path tiny-bert --task boolq --data-path passages.jsonl --output-dir study --eval-size 4 --max-steps 1
"$bin/tinyonn" heads plasticity measure --task boolq --output-dir study
test -s study/boolq/seed42/importance_post.jsonl
