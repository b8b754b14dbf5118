#!/bin/bash
# Runs one launcher per node, started by srun: node.sh {torchrun|deepspeed} MODULE [ARGUMENT ...]. common.sh sets the variables.
set -euo pipefail
launcher=$1
shift

# SLURM signals every process of a step. A launcher would end its ranks, at once or within 30 seconds, so it is shielded from
# these signals (slurm/shielded.py). The ranks handle the signals themselves; the stop file is for ranks without handlers yet.
trap 'echo signal >"$RECYCLE_JOB_DIR/stop" || true' TERM USR1 INT

if [[ $launcher == torchrun ]]; then
    command=(torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$TASKS"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m "$@")
else
    # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to the device numbers in world_info: for this node they must be those that
    # SLURM assigned; of other nodes' numbers only the count is used. Neither ssh nor a hostfile is needed.
    devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((TASKS - 1)))}
    list=$(tr ',' '\n' <<<"$devices" | head -n "$TASKS" | sed 's/.*/"&"/' | paste -sd,)
    [[ $(tr ',' '\n' <<<"$list" | wc -l) == "$TASKS" ]] \
        || { echo "error: $TASKS tasks on $(hostname) and CUDA_VISIBLE_DEVICES=$devices: request one GPU per task" >&2; exit 2; }
    world=$(for host in $HOSTS; do printf '"%s": [%s]\n' "$host" "$list"; done | paste -sd,)
    command=(deepspeed.launcher.launch --world_info="$(printf '{%s}' "$world" | base64 -w0 | tr '+/' '-_')"
        --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module "$@")
fi
"$PYTHON" slurm/shielded.py "${command[@]}" &
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done
exit "$code"
