#!/usr/bin/env bash
# Fuzzes the .mscan reader under AddressSanitizer and UndefinedBehaviorSanitizer: csrc/fuzz/run.sh [SECONDS=60]
#
# Needs clang with its fuzzer runtime, and a Python with tinyonn built (PYTHON, default python3) that writes the seeds.
# Prints the reason and succeeds where one is missing. A finding is kept under csrc/fuzz/build/findings.
set -euo pipefail

seconds="${1:-60}"
here="$(cd "$(dirname "$0")" && pwd)"
build="$here/build"
python="${PYTHON:-python3}"
mkdir -p "$build/findings"

skip() {
  echo "fuzzing skipped: $1"
  exit 0
}

command -v clang++ >/dev/null || skip "no clang++ (apt-get install clang)"
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -I"$here/.." -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined)
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >"$build/probe.cpp"
clang++ "${flags[@]}" "$build/probe.cpp" -o "$build/probe" 2>"$build/probe.log" ||
  skip "clang++ cannot link its fuzzer runtime: $(tail -n 1 "$build/probe.log")"
export PYTHONPATH="$here/../.."
"$python" -c "import tinyonn._C" 2>/dev/null || skip "$python cannot import tinyonn._C, which writes the seeds"

mapfile -t sources < <(find "$here/.." -maxdepth 1 -name '*.cpp' ! -name 'bind*.cpp' | sort)
clang++ "${flags[@]}" "${sources[@]}" "$here/fuzz_reader.cpp" -o "$build/fuzz_reader"
rm -rf "$build/seeds"
"$python" "$here/make_seeds.py" "$build/seeds"
mkdir -p "$build/corpus"
echo "fuzzing for $seconds s, log in $build/fuzz.log"
if ! "$build/fuzz_reader" "$build/corpus" "$build/seeds" -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=2048 -timeout=20 \
  -artifact_prefix="$build/findings/" -print_final_stats=1 >"$build/fuzz.log" 2>&1; then
  grep -v '^#' "$build/fuzz.log" | tail -n 60
  exit 1
fi
grep -E '^(Done|stat::(number|average|peak))' "$build/fuzz.log"
