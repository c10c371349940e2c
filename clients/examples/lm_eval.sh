#!/bin/sh
# lm-evaluation-harness: how often the model finds the likelier end of a sentence (the task in lm_eval/).
#
#     pip install "lm-eval[api]"
#     clients/examples/lm_eval.sh
#
# The harness tokenizes through the server, so it needs no tokenizer of its own. OPENAI_BASE_URL, OPENAI_API_KEY and
# MODEL name another server, its key and its model; further arguments go to lm_eval, "--tasks arc_easy" for one.
set -eu
cd "$(dirname "$0")"
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
export OPENAI_API_KEY="${OPENAI_API_KEY:-none}"
server="base_url=$url/completions,auth_token=$OPENAI_API_KEY,tokenizer_backend=remote"
exec lm_eval run --model local-completions --include_path lm_eval --tasks endings \
    --model_args "model=${MODEL:-classics-11m},$server,num_concurrent=8,max_length=2048" "$@"
