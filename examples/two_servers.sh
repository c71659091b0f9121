#!/bin/sh
# Serve the example twice, as two hosts would, with the tokens in one PostgreSQL database:
#     sh examples/two_servers.sh postgresql://user:password@host/database
# The user must be allowed to make a schema. Ports: 8001 and 8002, or those that follow the URL.
set -eu
FREEGPT_AUTH_STORE=${1:?give the URL of a database}
export FREEGPT_AUTH_STORE
first=${2:-8001} second=${3:-8002}
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
