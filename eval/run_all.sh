#!/usr/bin/env bash
# Every benchmark once, on tiny made-up samples of its schema: answered with all ablations and rotations, scored, reported,
# judged by a small local judge, compared, computed again from the answers; the encoder sets with an encoder of random
# weights, or with yours (ENCODER=FOLDER). Shows that everything runs; the scores mean nothing. Needs a checkpoint folder,
# for example the demo's:  bash eval/run_all.sh demo-out/stage2 [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?usage: bash eval/run_all.sh CHECKPOINT [OUT]}
out=${2:-eval-out}
python=${PYTHON:-python}
eval="$python -m medllava.eval"

$python tests/eval/make_samples.py "$out/data"
for data in "$out"/data/*/; do
  name=$(basename "$data")
  questions=$(ls "$data"questions.*)
  $eval answer --benchmark "$name" --questions "$questions" --images "${data}images" --model-path "$model" \
    --out "$out/$name" 2> "$out/log.txt" || { cat "$out/log.txt" >&2; exit 1; }
  $eval report --answers "$out/$name/answers.jsonl" --out "$out/$name/report" > "$out/$name.txt"
  $eval rescore "$out/$name/answers.jsonl" --against "$out/$name/report/report.json" > /dev/null
  sed -n '1,3p' "$out/$name.txt" | sed "s/^/  /"
done

# The same command again gives the same bytes.
$eval answer --benchmark own --questions "$out/data/own/questions.csv" --images "$out/data/own/images" \
  --model-path "$model" --out "$out/own_again" 2> "$out/log.txt" > /dev/null
$eval report --answers "$out/own_again/answers.jsonl" --out "$out/own_again/report" > /dev/null
cmp "$out/own/answers.jsonl" "$out/own_again/answers.jsonl"
cmp "$out/own/report/report.json" "$out/own_again/report/report.json"
echo "own, asked twice: answers.jsonl and report.json are the same bytes"

$eval compare "$out/quilt_vqa_red_unmarked" "$out/quilt_vqa_red" --names unmarked marked --out "$out/compared" | sed -n '3,6p'

$python tests/eval/judge_server.py "$out/judge.txt" 0 > "$out/judge_url.txt" &
judge=$!
trap 'kill $judge' EXIT
while [ ! -s "$out/judge_url.txt" ]; do sleep 0.1; done
$eval judge --mode pair --answers "$out/quilt_gpt/answers.jsonl" --base-url "$(cat "$out/judge_url.txt")" --model judge \
  --price 2.5 10 --max-usd 1 --out "$out/judged" 2> "$out/log.txt"

$python tests/eval/make_encoder_samples.py "$out/encoders" > "$out/log.txt" 2>&1
for data in "$out"/encoders/data/*/; do
  name=$(basename "$data")
  $eval encoder --model-path "${ENCODER:-$out/encoders/clip}" --benchmark "$name" --images "$data" \
    --out "$out/encoders/$name.json" 2> "$out/log.txt" | sed -n '1p' || { cat "$out/log.txt" >&2; exit 1; }
done

$eval overview "$out" --out "$out"
$eval harness --to model-index --report "$out/quilt_vqa/report/report.json" --out "$out/model_index.yaml"
echo "all benchmarks ran; reports in $out/*/report/report.html"
