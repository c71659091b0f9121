#!/bin/sh
# Serve the example twice, as two hosts would, with the tokens in one PostgreSQL database:
#     export FREEGPT_AUTH_STORE=postgresql://user:password@host/database
#     sh examples/two_servers.sh
# The user needs the right to create a schema. Ports: 8001 and 8002, or those given as arguments.
set -eu
: "${FREEGPT_AUTH_STORE:?set it to the URL of a database}"
first=${1:-8001} second=${2:-8002}
cd "$(dirname "$0")"

python -m freegpt_auth migrate
TOKEN=$(python -m freegpt_auth create two-servers)

python chat_server.py --port "$first" &
servers=$!
python chat_server.py --port "$second" &
servers="$servers $!"
trap 'kill $servers' INT TERM EXIT

cat << TXT

Both servers accept the token, and once revoke has returned, neither does. In another terminal:

curl -i http://127.0.0.1:$first/v1/models -H "Authorization: Bearer $TOKEN"
curl -i http://127.0.0.1:$second/v1/models -H "Authorization: Bearer $TOKEN"
FREEGPT_AUTH_STORE=... python -m freegpt_auth revoke $(printf %.14s "$TOKEN")

Stop the servers with Ctrl-C.

TXT
wait
