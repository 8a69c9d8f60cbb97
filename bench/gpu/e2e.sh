#!/usr/bin/env bash
# A model on an NVIDIA GPU from end to end: its tests, a demo that trains, measures and completes there, and the same prompt on GPU and CPU.
#
#   bench/gpu/e2e.sh [--out DIR] [--minutes M] [--device cuda:N] [--skip-tests]
#
# glmx is installed (or on PYTHONPATH) with its CUDA backend. Offline; M (default 1) bounds the training, all of it takes about four
# minutes more. Writes DIR/*.log and one line of JSON per step to DIR/e2e.jsonl (default: build/gpu_e2e). Ends with the number of failures.
set -u
cd "$(dirname "$0")/../.." || exit 2
out=build/gpu_e2e minutes=1 device=cuda tests=1
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --skip-tests) tests=0; shift ;;
    *) echo "e2e: $1: expected --out, --minutes, --device or --skip-tests" >&2; exit 2 ;;
  esac
done
: "${PYTHON:=python3}"
for library in glmx msgspec rich matplotlib tokenizers; do
  if ! "$PYTHON" -c "import $library" 2>/dev/null; then
    echo "e2e: $PYTHON has no $library" >&2
    exit 2
  fi
done
mkdir -p "$out" && : >"$out/e2e.jsonl"
failures=0

step() {  # step NAME COMMAND...: runs it, keeps what it says, writes its row
  local name=$1 begun=$SECONDS code
  shift
  echo "-- $name"
  "$@" >"$out/$name.log" 2>&1
  code=$?
  printf '{"stage": "e2e", "name": "%s", "ok": %s, "seconds": %d}\n' "$name" "$([ $code = 0 ] && echo true || echo false)" \
    $((SECONDS - begun)) | tee -a "$out/e2e.jsonl"
  if [ $code != 0 ]; then
    failures=$((failures + 1))
    tail -n 25 "$out/$name.log"
  fi
  return $code
}

glmx() { "$PYTHON" -m glmx "$@"; }

step env glmx env --json
[ $tests = 0 ] || step tests "$PYTHON" -m pytest tests/gpu/test_model.py -q -p no:cacheprovider -o "pythonpath=. tests tests/models"
rm -rf "$out/demo"
if step demo glmx demo --device "$device" --arch glm4_moe --minutes "$minutes" --out "$out/demo"; then
  tail -n 30 "$out/demo.log"
fi
checkpoint=$out/demo/run
if [ -f "$checkpoint/latest" ]; then
  words=("$checkpoint" --prompt "def read_config(path):" --max-tokens 64 --json)
  GLMX_LOG=kernels step generate glmx generate "${words[@]}" --device "$device"
  step generate_drafts glmx generate "${words[@]}" --device "$device" --num-speculative-tokens 3
  step generate_cpu glmx generate "${words[@]}" --device cpu
  step compare "$PYTHON" bench/gpu/e2e_compare.py "$out" "$device" && cat "$out/compare.log"
  # The same command goes on where the run was cut short: two steps more than it has.
  step resume glmx demo --device "$device" --arch glm4_moe --minutes 0.05 --out "$out/demo"
fi
echo "e2e: $failures failed; $out/e2e.jsonl"
exit "$failures"
