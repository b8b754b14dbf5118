#!/bin/bash
# One launcher on each node, started by srun: node.sh {torchrun|deepspeed} MODULE [ARGUMENT ...]. Variables come from common.sh.
set -euo pipefail
launcher=$1
shift

# SLURM's signals go to every process of a step. Launchers answer by ending their ranks, at once or within 30 seconds: they are
# shielded from them (slurm/shielded.py), the ranks hear them themselves, and this file serves those that do not listen yet.
trap 'echo signal >"$RECYCLE_JOB_DIR/stop" || true' TERM USR1 INT

if [[ $launcher == torchrun ]]; then
    command=(torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$TASKS"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m "$@")
else
    # DeepSpeed's launcher makes CUDA_VISIBLE_DEVICES of the numbers it is told: they must be those that SLURM gave to this node.
    # Of the other nodes it takes how many there are. No ssh, no hostfile.
    devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((TASKS - 1)))}
    list=$(tr ',' '\n' <<<"$devices" | head -n "$TASKS" | sed 's/.*/"&"/' | paste -sd,)
    [[ $(tr ',' '\n' <<<"$list" | wc -l) == "$TASKS" ]] \
        || { echo "error: $TASKS tasks on $(hostname) and CUDA_VISIBLE_DEVICES=$devices: ask for a GPU for each task" >&2; exit 2; }
    world=$(for host in $HOSTS; do printf '"%s": [%s]\n' "$host" "$list"; done | paste -sd,)
    command=(deepspeed.launcher.launch --world_info="$(printf '{%s}' "$world" | base64 -w0 | tr '+/' '-_')"
        --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module "$@")
fi
"$PYTHON" slurm/shielded.py "${command[@]}" &
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done
exit "$code"
