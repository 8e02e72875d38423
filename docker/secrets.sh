#!/bin/sh
# Prints a fresh .env for docker-compose.yml, or with `kubernetes` the file for the Secret of docker/kubernetes:
#
#   sh docker/secrets.sh > .env
#
# Make it once and keep it: jobs and webhooks hang on the master key, the store's volume on its keys.
set -eu

hex() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

password=$(hex 24)
access_key=$(hex 10)
secret_key=$(hex 32)
master_key=$(head -c 32 /dev/urandom | base64 | tr -d '\n')

case "${1:-compose}" in
compose)
    cat <<ENV
QUEUE_PASSWORD=$password
STORE_ACCESS_KEY=$access_key
STORE_SECRET_KEY=$secret_key
MASTER_KEY=$master_key
# A token of the HuggingFace hub, for gated models.
HF_TOKEN=
# Where the service is published; put TLS in front of anything but loopback.
PUBLISH=127.0.0.1:8000
ENV
    ;;
kubernetes)
    cat <<ENV
QUEUE_PASSWORD=$password
BATHYSCOPE_REDIS_URL=redis://:$password@queue:6379/0
BATHYSCOPE_MASTER_KEY=$master_key
AWS_ACCESS_KEY_ID=
AWS_SECRET_ACCESS_KEY=
HF_TOKEN=
ENV
    ;;
*)
    echo "usage: sh docker/secrets.sh [compose|kubernetes]" >&2
    exit 2
    ;;
esac
