# Shared by the *.sbatch files, which run in the repository's root: finds Python, starts the ranks, and turns a stop request or a
# crash into a requeue. A job and its run talk through the files of $JOB_DIR (recycle_ds/parallel/job.py).
# shellcheck shell=bash

REPO=${SLURM_SUBMIT_DIR:?submit with sbatch from the root of the repository}
[[ -f $REPO/slurm/common.sh ]] || { echo "error: $REPO is not the root of the repository: cd there, then sbatch" >&2; exit 2; }
cd "$REPO"
# shellcheck source=/dev/null
if [[ -f slurm/site.env ]]; then source slurm/site.env; fi
# shellcheck source=defaults.env
source slurm/defaults.env

say() { echo "[$(date '+%F %T')] job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }
fail() { echo "error: $*" >&2; exit 2; }

if [[ -z $PYTHON ]]; then
    if [[ -z $CONTAINER && -x .venv/bin/python ]]; then PYTHON=$REPO/.venv/bin/python; else PYTHON=python3; fi
fi
[[ $JOBS_DIR == /* ]] || JOBS_DIR=$REPO/$JOBS_DIR
JOB_DIR=$JOBS_DIR/$SLURM_JOB_ID
TASKS=${SLURM_NTASKS_PER_NODE:-1}
TASKS=${TASKS%%(*}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
# The first node is where the shell runs. Ports differ from job to job, and from start to start: the one before may linger.
export MASTER_ADDR=${HOSTS%% *} MASTER_PORT=$((10000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} % 8) % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONUNBUFFERED=1
export RECYCLE_JOB_DIR=$JOB_DIR TASKS HOSTS PYTHON REQUEUE

job_field() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2; }

# What SLURM knows beats the variable, which older releases lack and a job submitted from within a job inherits.
end=$(job_field EndTime || true)
if end=$(date -d "$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi

SRUN=(srun --kill-on-bad-exit=1) WRAP=()
case $CONTAINER in
    "") ;;
    apptainer) WRAP=(apptainer exec --nv ${MOUNTS:+--bind "$MOUNTS"} --pwd "$REPO" "${IMAGE:?CONTAINER=apptainer needs IMAGE}") ;;
    pyxis)
        SRUN+=(--container-image="${IMAGE:?CONTAINER=pyxis needs IMAGE}" --container-workdir="$REPO")
        [[ -z $MOUNTS ]] || SRUN+=(--container-mounts="$MOUNTS")
        ;;
    *) fail "CONTAINER=$CONTAINER: must be apptainer, pyxis or empty" ;;
esac

# launch MODULE [ARGUMENT ...]: all ranks of the job. The GPUs that SLURM gave to a step stay as they are.
launch() {
    local per_task=${SLURM_CPUS_PER_TASK:-1}
    local ranks=(--ntasks="$((SLURM_JOB_NUM_NODES * TASKS))" --ntasks-per-node="$TASKS" --cpus-per-task="$per_task")
    local nodes=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$((per_task * TASKS))")
    case $LAUNCHER in
        srun) exec "${SRUN[@]}" "${ranks[@]}" "${WRAP[@]}" "$PYTHON" -m "$@" ;;
        torchrun | deepspeed) exec "${SRUN[@]}" "${nodes[@]}" "${WRAP[@]}" bash slurm/node.sh "$LAUNCHER" "$@" ;;
        # shellcheck disable=SC2086 # a command with its options
        mpirun) exec $MPIRUN -n "$((SLURM_JOB_NUM_NODES * TASKS))" "${WRAP[@]}" "$PYTHON" -m "$@" ;;
        *) fail "LAUNCHER=$LAUNCHER: must be srun, torchrun, deepspeed or mpirun" ;;
    esac
}

# run_and_requeue MODULE [ARGUMENT ...]: runs the ranks, and does what their end asks for. Sets nothing, exits the job.
run_and_requeue() {
    mkdir -p "$JOB_DIR"
    rm -f "$JOB_DIR"/{stop,outcome,error}
    echo "$(hostname) $$" >"$JOB_DIR/shell"
    stopping=
    trap 'ask_to_stop USR1' USR1
    trap 'ask_to_stop TERM' TERM
    say "$LAUNCHER, $SLURM_JOB_NUM_NODES node(s) x $TASKS task(s): $*"
    launch "$@" &
    local child=$! code=0
    # a trap runs when `wait` is interrupted, never in the middle of a foreground command
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    if [[ -n $stopping ]]; then code=0; wait "$child" || code=$?; fi
    after "$code"
}

# No signal goes to a launcher, which would end the ranks: the first rank finds the file at its next step.
ask_to_stop() {
    stopping=$1
    say "got $1: the run is asked to save and to leave"
    echo "$1" >"$JOB_DIR/stop"
}

after() {
    local code=$1 outcome
    outcome=$(cat "$JOB_DIR/outcome" 2>/dev/null || true)
    say "the ranks left with exit code $code, outcome: ${outcome:-none}"
    case $outcome in
        finished) rm -rf "$JOB_DIR"; exit 0 ;;
        failed) say "given up: $(cat "$JOB_DIR/error" 2>/dev/null || echo 'the error is above')"; exit 1 ;;
        stopped) again "stopped" ;;
    esac
    [[ -z $stopping ]] || again "stopped before its first step"
    crashed "$code"
}

# A crash that came further than the one before may have been a node's fault; one that comes again at the same place is not.
crashed() {
    local code=$1 progress count=0 before=
    progress=$(cat "$JOB_DIR/progress" 2>/dev/null || echo 0)
    read -r count before 2>/dev/null <"$JOB_DIR/crashes" || true
    if [[ ${before:-} == "$progress" ]]; then count=$((count + 1)); else count=1; fi
    echo "$count $progress" >"$JOB_DIR/crashes"
    summary
    if ((count > MAX_CRASHES)); then
        say "given up: $count crashes in a row with nothing new on disk (last: exit code $code)"
        exit 1
    fi
    again "crash $count of $MAX_CRASHES at this place"
}

# What the run says of itself where it could not do so any more.
summary() {
    local run_dir
    run_dir=$(cat "$JOB_DIR/run_dir" 2>/dev/null) || return 0
    "${WRAP[@]}" "$PYTHON" tools/summarise_runs.py "$run_dir" || true
}

# Starts the job again, unless a person cancelled it or SLURM has requeued it already.
again() {
    [[ $REQUEUE == 1 ]] || { say "$1; REQUEUE=$REQUEUE: not started again"; exit 75; }
    local state
    state=$(job_field JobState || echo unknown)
    case $state in
        RUNNING | TIMEOUT | NODE_FAIL) ;;
        *) say "$1; the job is $state: not requeued from here"; exit 75 ;;
    esac
    say "$1: requeueing"
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    # SLURM ends this shell; leaving by itself could be taken for the end of the job
    sleep 60 & wait $! || true
    exit 75
}
