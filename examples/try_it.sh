#!/bin/sh
# Install freegpt_auth into .venv, create a token and serve the example on 127.0.0.1:8000, or on the port that is given:
#
#     sh examples/try_it.sh 8001
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
TOKEN=$(.venv/bin/python -m freegpt_auth create my-application)

cat << TXT

Paste this into another terminal. It answers 200 and repeats your message:

curl -i http://127.0.0.1:$PORT/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer $TOKEN" \\
  -d '{"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}'

Leave the Authorization line out, and it answers 401 and "You didn't provide an API key".
For the commands of the README, first run: . .venv/bin/activate
Stop the server with Ctrl-C.

TXT
exec .venv/bin/python examples/chat_server.py --port "$PORT"
