#!/bin/sh
# Let lm-eval ask the text towers of merged checkpoints, without pictures, on tasks of local files, and compare them.
#
#   examples/local_tasks/run_lm_eval.sh WORK ENVIRONMENT [QUESTIONS]
#
# ENVIRONMENT is a virtual environment with lm-eval; docs/evaluation.md says how one is made. Nothing is downloaded.
set -eu
work=$1 environment=$2
here=$(dirname "$0")
export HF_HUB_OFFLINE=1

python "$here/make_data.py" "$work" "${3:-300}"
for weight in 0.0 0.5 1.0; do
    polymerge evaluate "$work/weight-$weight" --with lm-eval --environment "$environment" --batch-size 16 \
        --tasks polymerge_words,polymerge_words_written -o "$work/text/weight-$weight" --force \
        -- --include_path "$work/lm_eval"
done
polymerge compare "$work"/text/* --template weight-0.0 -o "$work/text-table"
