#!/bin/sh
# Let lmms-eval evaluate merged checkpoints on a task of local files, compare them, and choose the weight by their logs.
#
#   examples/local_tasks/run_lmms_eval.sh WORK ENVIRONMENT [QUESTIONS]
#
# ENVIRONMENT is a virtual environment with lmms-eval; docs/evaluation.md says how one is made. Nothing is downloaded.
set -eu
work=$1 environment=$2
here=$(dirname "$0")
export HF_HUB_OFFLINE=1

python "$here/make_data.py" "$work" "${3:-300}"
for weight in 0.0 0.5 1.0; do
    polymerge evaluate "$work/weight-$weight" --with lmms-eval --environment "$environment" --tasks polymerge_exam \
        -o "$work/runs/weight-$weight" --force -- --include_path "$work/lmms_eval"
done
polymerge compare "$work"/runs/* --template weight-0.0 -o "$work/table"
polymerge search --from-logs "$work/runs" --task polymerge_exam --samples 0
