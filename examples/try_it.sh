#!/bin/sh
# Install freegpt_auth into .venv, create a token and serve the example on 127.0.0.1:8000.
set -eu
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/python -m pip install --quiet -r requirements/try-it.txt
.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps .
TOKEN=$(.venv/bin/python -m freegpt_auth create my-application)

cat << TXT

Paste this into another terminal. It answers 200 and repeats your message:

curl -i http://127.0.0.1:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer $TOKEN" \\
  -d '{"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}'

Leave the Authorization line out, and it answers 401 and "You didn't provide an API key".
For the commands of the README, first run: . .venv/bin/activate
Stop the server with Ctrl-C.

TXT
exec .venv/bin/python examples/chat_server.py "$@"
