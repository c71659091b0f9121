#!/bin/sh
# Install freegpt_auth into .venv, create a token and serve the example on 127.0.0.1:8000, or on the port that is given:
#
#     sh examples/try_it.sh 8001
#
# The token is named after the port, and replaces that of the last run on it.
set -eu
cd "$(dirname "$0")/.."
PORT=${1:-8000}

python3 -m venv .venv
# The request below would take the token to the program that has the port.
.venv/bin/python -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1])))' "$PORT" 2> /dev/null || {
  echo "Port $PORT of 127.0.0.1 cannot be used. Give a free one: sh examples/try_it.sh 8001" >&2
  exit 1
}
.venv/bin/python -m pip install --quiet -r requirements/try-it.txt
.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps .
# The port is free, so no server of an earlier run needs this token any more.
.venv/bin/python -m freegpt_auth delete "try-it-$PORT" > /dev/null 2>&1 || true
TOKEN=$(.venv/bin/python -m freegpt_auth create "try-it-$PORT")

cat << TXT

Paste this into another terminal. It answers 200 and repeats your message:

curl -i http://127.0.0.1:$PORT/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer $TOKEN" \\
  -d '{"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}'

Without the Authorization line the answer is 401 and "You didn't provide an API key".
For the commands of the README, first run: . .venv/bin/activate
Stop the server with Ctrl-C.

TXT
exec .venv/bin/python examples/chat_server.py --port "$PORT"
