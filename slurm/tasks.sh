# Sourced by common.sh: how many ranks a job has on each node, and how many CPUs each rank has, however they were requested.
# shellcheck shell=bash

# expand COUNTS: a line for each node; "8(x2),4" gives 8, 8 and 4.
expand() {
    local part times
    for part in ${1//,/ }; do
        times=1
        [[ $part != *"(x"* ]] || { times=${part#*"(x"}; times=${times%)}; }
        while ((times-- > 0)); do echo "${part%%(*}"; done
    done
}

# count_tasks: sets RANKS (of the job), TASKS (of a node; of uneven nodes the largest number), EVEN (empty for uneven nodes) and
# CPUS (of a rank). SLURM_NTASKS is what was requested with --ntasks, --ntasks-per-node, --ntasks-per-gpu or --gpus-per-task;
# without it a job has one task on each node, whatever SLURM_TASKS_PER_NODE is.
count_tasks() {
    local counts=() cpus=() sum=0 count node share nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-0}
    [[ -z ${SLURM_HET_SIZE:-} ]] || fail "this is a heterogeneous job (SLURM_HET_SIZE=$SLURM_HET_SIZE): submit one component, as all ranks of a run need the same resources"
    ((${SLURM_NTASKS_PER_GPU:-1} == 1)) || fail "SLURM_NTASKS_PER_GPU=$SLURM_NTASKS_PER_GPU: ranks would share a GPU: submit with --ntasks-per-gpu=1"
    RANKS=${SLURM_NTASKS:-}
    if [[ -z $RANKS && -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
        count=${SLURM_NTASKS_PER_NODE%%(*}
        RANKS=$((nodes * count))
    fi
    if [[ -z $RANKS ]]; then
        ((gpus <= 1)) || fail "$gpus GPUs per node, and no number of tasks: submit with --ntasks-per-node=$gpus, one rank per GPU"
        RANKS=$nodes
    fi
    mapfile -t counts < <(expand "${SLURM_TASKS_PER_NODE:-}")
    for count in ${counts[@]+"${counts[@]}"}; do sum=$((sum + count)); done
    if ((sum != RANKS || ${#counts[@]} != nodes)); then
        counts=()
        for ((node = 0; node < nodes; node++)); do counts+=($(((RANKS + nodes - 1 - node) / nodes))); done
    fi
    EVEN=1 TASKS=${counts[0]}
    for count in "${counts[@]}"; do
        [[ $count == "${counts[0]}" ]] || EVEN=
        ((count <= TASKS)) || TASKS=$count
    done
    CPUS=${SLURM_CPUS_PER_TASK:-}
    if [[ -z $CPUS && ${SLURM_TRES_PER_TASK:-} =~ (^|,)cpu[:=]([0-9]+) ]]; then CPUS=${BASH_REMATCH[2]}; fi
    if [[ -z $CPUS ]]; then # --cpus-per-gpu, --exclusive: what the node has for each of its ranks
        mapfile -t cpus < <(expand "${SLURM_JOB_CPUS_PER_NODE:-}")
        for ((node = 0; node < nodes; node++)); do
            ((counts[node])) || continue
            share=$((${cpus[node]:-0} / counts[node]))
            [[ -n $CPUS ]] && ((CPUS <= share)) || CPUS=$share
        done
    fi
    ((CPUS >= 1)) || CPUS=1
    ((gpus <= TASKS || gpus <= 1)) || say "note: $gpus GPUs per node and $TASKS rank(s), each of which uses one: --ntasks-per-node=$gpus uses all"
}

# srun's options for a step with all ranks, as lines.
rank_options() {
    echo "--ntasks=$RANKS"
    [[ ${SLURM_TRES_PER_TASK:-} =~ (^|,)cpu[:=] ]] || echo "--cpus-per-task=$CPUS"
    # --ntasks-per-gpu, which the step inherits, excludes the other
    [[ -z $EVEN || -n ${SLURM_NTASKS_PER_GPU:-} ]] || echo "--ntasks-per-node=$TASKS"
}

# srun's options for a step with one launcher on each node, which has all CPUs and GPUs of its ranks, as lines.
launcher_options() {
    printf '%s\n' "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "--cpus-per-task=$((CPUS * TASKS))"
    # of a job with a number of GPUs per task, a step's task has so many, unless the step says otherwise
    [[ -z ${SLURM_GPUS_PER_TASK:-}${SLURM_TRES_PER_TASK:-} || -z ${SLURM_GPUS_ON_NODE:-} ]] || echo "--gpus-per-node=$SLURM_GPUS_ON_NODE"
}
