#!/usr/bin/env bash
# All benchmarks that need a GPU, in less than 9 minutes:  benchmarks/gpu.sh OUT
# The same in small, on a CPU, in less than one:           benchmarks/gpu.sh OUT --tiny
# Each part writes a JSON file into OUT and has its own time limit. A part that fails does not stop the others; the status is then 1.
# PYTHON names the interpreter, if it is not python3.
set -u
if [ $# -lt 1 ] || [ $# -gt 2 ] || [[ $1 == -* ]] || [ "${2:---tiny}" != --tiny ]; then
    echo "usage: benchmarks/gpu.sh OUT [--tiny]" >&2
    exit 2
fi
python=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}: set PYTHON" >&2; exit 2; }
python=$(realpath -s "$python")
out=$(realpath -m "$1")
mkdir -p "$out" || exit 2
cd "$(dirname "$0")/.."
failed=()
export COLUMNS=160

part() { # NAME SECONDS ARGUMENTS...
    local name=$1 seconds=$2
    shift 2
    echo "== $name: bench $*"
    timeout "$seconds" "$python" -m moe_llava.cli bench "$@" --json "$out/$name.json" || failed+=("$name (status $?)")
}

sizes() { # of a layer, for numbers of tokens: WIDTHxFFN TOKENS...
    local widths=$1
    shift
    printf -- '--size %sx'"$widths"' ' "$@"
}

# The layer checks every way to compute it against float64 before it times it. The crossing shows up to how many tokens batched_mm is faster
# than grouped_mm, which takes a quarter of the GPU's memory for copies at most. sonicmoe and deepgemm take part in every layer in bfloat16,
# and FP8 products in its forward pass, where they can be loaded; the notes in the report say why not.
# shellcheck disable=SC2046
if [ "${2:-}" = --tiny ]; then
    part layer 120 layer --size 64x32x48 --dtype bfloat16 --no-growth --rounds 1
    part check 120 layer --size 64x32x48 --dtype float32 --no-growth --phase forward --rounds 1
    part fine 120 layer --size 64x32x16 --experts 16 --top-k 8 --dtype bfloat16 --no-growth --rounds 1
    part crossing 120 layer $(sizes 32x48 1 4) --dtype bfloat16 --phase forward --no-growth --rounds 1
    part train 120 train --size tiny --dtype bfloat16 --no-logits --rounds 1
    part prompt 120 model --size tiny --dtype bfloat16 --rounds 1
    part decode 120 generate --size tiny --dtype bfloat16 --rows 1 --rows 2 --new-tokens 2 --rounds 1
    part compiled 120 generate --size tiny --dtype bfloat16 --rows 1 --new-tokens 2 --compile --rounds 1
else
    part layer 90 layer --size 4096x2560x10240 --dtype bfloat16 --rounds 7
    part check 40 layer --size 512x1024x2816 --size 64x2560x10240 --dtype float32 --no-growth --rounds 3
    part fine 50 layer --size 4096x2048x768 --experts 64 --top-k 8 --dtype bfloat16 --no-growth --rounds 5
    part crossing 60 layer $(sizes 2560x10240 1 2 4 8 16 32 64 128 256) --dtype bfloat16 --phase forward --no-growth --rounds 5
    part train 80 train --size phi2 --dtype bfloat16 --rounds 5
    part families 60 train --size gemma --size qwen --rows 16 --dtype bfloat16 --no-logits --rounds 5
    part prompt 40 model --size gemma --size qwen --rows 16 --dtype bfloat16 --rounds 5
    part decode 50 generate --size phi2 --dtype bfloat16 --rows 1 --rows 64 --new-tokens 64 --rounds 5
    part compiled 70 generate --size phi2 --dtype bfloat16 --rows 1 --new-tokens 64 --compile --rounds 3
fi
[ ${#failed[@]} -eq 0 ] && exit
printf 'failed: %s\n' "${failed[*]}" >&2
exit 1
