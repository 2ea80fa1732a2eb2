#!/bin/bash
# preStop of a Ray pod: has Ray drain the pod's node, so that the run writes a checkpoint and leaves it. Waits until it
# has, for at most SECONDS.   drain.sh SECONDS [PROC]
set -eu
proc=${2:-/proc}
raylet=$(grep -lsz -- '^--node_id=' "$proc"/[0-9]*/cmdline | head -n 1)
[ -n "$raylet" ] || exit 0 # Ray has not started yet, or has exited
node=$(sed -zn 's/^--node_id=//p' "$raylet" | tr -d '\0')
ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "its pod ends" \
    --deadline-remaining-seconds "$1"

# Succeed while the pod is busy: a worker until Ray stops its node (a dead process has no command line); the head, where
# actors of Ray's own remain, until no job is left.
busy() {
    grep -qs . "$raylet" || return 1
    ! grep -qzx -e --head "$raylet" || grep -qsz '^ray::JobSupervisor' "$proc"/[0-9]*/cmdline
}
end=$((SECONDS + $1))
while [ "$SECONDS" -lt "$end" ] && busy; do sleep 1; done
