#!/usr/bin/env bash
# The Pile (Gao et al., 2020) in 30 files of JSON lines, with its held-out sets: FOLDER/train/00.jsonl.zst to
# 29.jsonl.zst, FOLDER/val.jsonl.zst and FOLDER/test.jsonl.zst. Run again, it goes on where it stopped.
#
#   train/download_pile.sh [FOLDER] [FIRST LAST]     e.g. train/download_pile.sh runs/pile 0 2
#
# FOLDER: default runs/pile. FIRST LAST: only these of the train files; default 0 29.
# PILE_URL: a mirror with these names. The Pile's own host is gone; the default is HuggingFace's monology/pile-uncopyrighted,
# which lacks the parts that its makers took for copyrighted (Books3 among them).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/download.sh"

readonly URL=${PILE_URL:-https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main}

(($# <= 3 && $# != 2)) || fail "got $# arguments, takes [FOLDER] [FIRST LAST]: a folder, then both numbers or none"
folder=${1:-runs/pile} first=${2:-0} last=${3:-29}
for number in "$first" "$last"; do
  [[ $number =~ ^[0-2]?[0-9]$ ]] || fail "FIRST LAST: got $number, takes 0 to 29"
done
((10#$first <= 10#$last)) || fail "FIRST LAST: got $first $last, takes them in order"
need_curl

for ((i = 10#$first; i <= 10#$last; i++)); do
  printf -v name 'train/%02d.jsonl.zst' "$i"
  download "$URL/$name" "$folder/$name"
done
for name in val.jsonl.zst test.jsonl.zst; do
  download "$URL/$name" "$folder/$name"
done
