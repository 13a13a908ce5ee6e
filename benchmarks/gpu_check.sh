#!/usr/bin/env bash
# Everything that needs a GPU, once: two models, made here, in four precisions through the gate, their
# placement and their latency on CUDA. Prints one Markdown table; the steps' output stays in DIR.
#
#     benchmarks/gpu_check.sh DIR
#
# A step that fails is a row that says why. Exit code 5 on a machine without CUDA.
set -euo pipefail
dir=${1:?name a directory to write}
shapes=1x32,8x128,64x512

python -m benchmarks.gpu_check models "$dir"
for model in bert gpt2; do
  made="$dir/$model"
  onnxpress compress quantize "$made/source" --scheme weight-only --bits 8 --overwrite -o "$made/quantized"
  bundles=()
  for kind in fp32 fp16 bf16 int8; do
    source="$made/source" dtype=$kind
    if [ $kind = int8 ]; then source="$made/quantized" dtype=fp32; fi
    if onnxpress export onnx "$source" --target cuda --dtype $dtype --provider cuda --overwrite --json \
      -o "$made/$kind" > "$made/$kind.export" 2> "$made/$kind.error"; then
      bundles+=("$kind=$made/$kind")
      onnxpress export inspect "$made/$kind" --provider cuda --json \
        > "$made/$kind.inspect" 2> "$made/$kind.error" || true
    fi
  done
  if [ ${#bundles[@]} -gt 0 ]; then
    onnxpress benchmark report "${bundles[@]}" --baseline "$made/source" --provider cuda \
      --shapes $shapes --overwrite -o "$made/report" >&2 || true
  fi
  python -m benchmarks.gpu_check half "$made" $shapes
done
python -m benchmarks.gpu_check table "$dir"
