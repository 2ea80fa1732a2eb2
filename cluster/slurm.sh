#!/usr/bin/env bash
# One run on Slurm: starts Ray on the nodes of the allocation and the job on it, and queues itself again until the run
# has finished.
#
#     . .venv/bin/activate                     # one that every node sees; sbatch takes the environment along
#     export EIWTRAIN_STORAGE=/shared/runs EIWTRAIN_DATA=/shared/data MLFLOW_TRACKING_URI=http://mlflow.example:5000
#     sbatch --partition=gpu cluster/slurm.sh configs/lsun.yaml
#
# The arguments after the script are those of `python -m eiwtrain.run`. Options of sbatch go before it and override
# those below: one node and 4 GPUs, as many as most configs are meant for.
# On GPUs, workers.max is their number in the allocation unless it is given there.
# The job writes a checkpoint and queues itself again when its time is up (--signal), when it is preempted, and on
#     scancel --batch --signal=TERM JOB
# On `scancel --batch --signal=INT JOB` it writes a checkpoint and stops; submit it again to resume.
# It hears of a preemption in time with SlurmctldParameters=preempt_send_user_signal and a GraceTime that the checkpoint
# fits into. Anything that stops Ray and the job at once (a node that fails, plain `scancel` and `scontrol requeue`)
# costs the steps since the last checkpoint.
#
# Ray listens on the nodes' addresses, for the allocation's other nodes, and refuses anyone without this job's token.
#SBATCH --job-name=eiwtrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
start_seconds=300 # Ray must be up by then

# Print this node's address, as the others know it. On its own machine its name may resolve to 127.0.1.1.
own_address() {
    local name found
    name=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    found=$(getent ahostsv4 "$name" | awk '$1 !~ /^127\./ && !n++ {print $1}')
    echo "${found:-$(hostname -I | awk '{print $1}')}"
}

# Succeed if something listens at the host's port.
listens() { timeout --signal=KILL 5 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; }

# shellcheck disable=SC2329  # srun calls it
# Run Ray on one node, until USR1. It ignores TERM, which Slurm sends to all steps of a job at once, because the workers
# must write a checkpoint first. The head removes the file `mark` when its Ray has exited.
ray_node() {
    local head=$1 port=$2 mark=$3 seconds=$4 address temp ray stopping=''
    local -a place
    trap '' TERM
    address=$(own_address)
    # the node's own folder, for shards and compiled kernels
    export TMPDIR=${EIWTRAIN_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
    export TRITON_CACHE_DIR=$TMPDIR/triton-$UID
    mkdir -p "$TMPDIR"
    if [ "$SLURM_NODEID" = 0 ]; then
        place=(--head --port="$port" --include-dashboard=false --ray-client-server-port="$((port + 1))")
    else
        place=(--address="$head:$port")
        until listens "$head" "$port"; do
            [ "$SECONDS" -lt "$seconds" ] || { echo "$SLURMD_NODENAME: no Ray at $head:$port" >&2; exit 1; }
            sleep 1
        done
    fi
    temp=$(mktemp -d /tmp/ray-XXXXXX) # short, as it holds sockets
    ray start "${place[@]}" --block --node-ip-address="$address" --temp-dir="$temp/ray" --disable-usage-stats \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" >"$temp/log" 2>&1 &
    ray=$!
    trap 'stopping=yes; kill -TERM $ray' USR1
    while kill -0 "$ray" 2>/dev/null; do wait "$ray" || true; done
    [ -n "$stopping" ] || { echo "Ray ended on $SLURMD_NODENAME:"; tail -n 20 "$temp/log"; } >&2
    [ "$SLURM_NODEID" != 0 ] || rm -f "$mark"
    rm -rf "$temp"
}

# Succeed if at least this number of nodes is in the cluster.
joined() {
    timeout 60 python -c '
import sys, ray
ray.init(logging_level="ERROR", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))' "$1" 2>/dev/null
}

next='' driver='' # what to do when the driver has exited; its pid
# shellcheck disable=SC2329  # the traps call it
end() {
    next=$1
    [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true
}
trap 'end requeue' TERM
trap 'end stop' INT

RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token # srun passes them on
head=$(own_address)
port=$((20000 + SLURM_JOB_ID % 5000 * 2)) # another job on the node has another one
mark=$(mktemp /tmp/ray-XXXXXX)            # this script and Ray's head are on the same node
trap 'rm -f "$mark"' EXIT
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --wait=0 --kill-on-bad-exit=0 \
    bash -c "set -euo pipefail; $(declare -f own_address listens ray_node); ray_node $head $port $mark $start_seconds" &
nodes=$!

export RAY_ADDRESS=$head:$port
# a stopped run prints this command
partition=${SLURM_JOB_PARTITION:+--partition=$SLURM_JOB_PARTITION }
export EIWTRAIN_COMMAND="sbatch $partition--nodes=$SLURM_JOB_NUM_NODES cluster/slurm.sh $*"
deadline=$((SECONDS + start_seconds)) up=yes
until [ -n "$next" ] || joined "$SLURM_JOB_NUM_NODES"; do
    if ! [ -e "$mark" ] || ! kill -0 "$nodes" 2>/dev/null; then
        up=''
        break
    elif [ "$SECONDS" -ge "$deadline" ]; then
        listens "$head" "$port" || up='' # the head and some of the nodes may be enough
        break
    fi
    sleep 2
done

if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] && [[ ${1:--} != -* ]]; then
    set -- "$1" "workers.max=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))" "${@:2}" # of two, the last one counts
fi
code=143
if [ -z "$next$up" ]; then
    echo "error: Ray's head on $SLURMD_NODENAME has ended or did not start within $start_seconds s" >&2
    code=1
elif [ -z "$next" ]; then
    python -u -m eiwtrain.run "$@" &
    driver=$!
    wait "$driver" && code=0 || code=$?
    while kill -0 "$driver" 2>/dev/null; do # a signal interrupted the waiting
        wait "$driver" && code=0 || code=$?
    done
fi

kill -USR1 "$nodes" 2>/dev/null || true
for _ in {1..60}; do
    kill -0 "$nodes" 2>/dev/null || break
    sleep 1
done
if [ "$code" = 75 ] || [ "$code$next" = 143requeue ]; then
    echo "back into the queue, after $((${SLURM_RESTART_COUNT:-0} + 1)) starts"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
