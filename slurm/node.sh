#!/bin/bash
# One launcher on each node, started by srun: node.sh {torchrun|deepspeed} MODULE [ARGUMENT ...]. Variables come from common.sh.
set -euo pipefail
launcher=$1
shift

if [[ $launcher == torchrun ]]; then
    exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$TASKS" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m "$@"
fi

# DeepSpeed's launcher makes CUDA_VISIBLE_DEVICES of the numbers it is told: they must be those that SLURM gave to this node. Of
# the other nodes it takes how many there are. No ssh, no hostfile.
devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((TASKS - 1)))}
list=$(tr ',' '\n' <<<"$devices" | head -n "$TASKS" | sed 's/.*/"&"/' | paste -sd,)
world=$(for host in $HOSTS; do printf '"%s": [%s]\n' "$host" "$list"; done | paste -sd,)
exec "$PYTHON" -m deepspeed.launcher.launch --world_info="$(printf '{%s}' "$world" | base64 -w0 | tr '+/' '-_')" \
    --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module "$@"
