#!/usr/bin/env bash
# A training on a spot machine of AWS, which may be taken away with a notice of two minutes:
#
#     ./spot.sh RECIPE RUN [--key value ...]
#
# Start it at every boot (a unit of systemd, a user data script), with RUN on a volume that outlives the machine: it goes
# on where the last machine stopped. Other clouds send the notice as SIGTERM at shutdown, which megdet takes by itself.
set -uo pipefail
metadata=${METADATA:-http://169.254.169.254}
recipe=$1 run=$2
shift 2
megdet train "$recipe" --run "$run" "$@" &
training=$!
trap 'kill -TERM "$training"' TERM INT
while kill -0 "$training" 2>/dev/null; do
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token")
    if curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action" >/dev/null; then
        kill -USR1 "$training"
        break
    fi
    sleep "${SECONDS_BETWEEN:-5}" &
    wait -n "$training" $!
done
wait "$training"
