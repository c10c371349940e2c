#!/bin/sh
# The API with curl alone: a completion, a stream, a structured answer, and a state that is saved and continued.
#
#     clients/examples/curl.sh
#
# OPENAI_BASE_URL and OPENAI_API_KEY name another server and its key.
set -eu
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}

ask() { # METHOD ROUTE [BODY]: the answer; an error ends the script, after the server's own words
    curl --silent --show-error --no-buffer --fail-with-body --write-out '\n' --request "$1" "$url$2" \
        --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
        ${3:+--header "Content-Type: application/json" --data "$3"}
}

echo "# The models"
ask GET /models

echo "# A completion"
ask POST /completions '{"prompt": "The old man looked at the sea and", "max_tokens": 24, "temperature": 0}'

echo "# The same as a stream of server-sent events, with the token counts at its end"
ask POST /completions '{"prompt": "The old man looked at the sea and", "max_tokens": 4, "temperature": 0,
    "stream": true, "stream_options": {"include_usage": true}}'

echo "# An answer of a given form: a regular expression"
ask POST /completions '{"prompt": "The captain was born in the year", "max_tokens": 16, "temperature": 0,
    "structured_outputs": {"regex": " 1[78][0-9]{2}\\."}}'

echo "# A text that is read once, and saved under a name ..."
ask POST /states/prefill '{"prompt": "Call me Ishmael. Some years ago, having little or no money in my purse, I thought I would sail about a little and see the watery part of the world.", "name": "ishmael", "ttl": 600}'

echo "# ... and continued without being sent or read again: cached_tokens counts what was there already"
ask POST /completions '{"state": "ishmael", "prompt": " The ship", "max_tokens": 24, "temperature": 0}'

echo "# Deleted"
ask DELETE /states/ishmael
