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

# What scontrol calls this job: the number alone may stand for all tasks of an array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
# scontrol must not be told by the user's environment how to print times.
job_field() { SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$JOB" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2; }
# A job that was submitted from within a task of an array inherits that array's number.
known=$(job_field JobId || true)
[[ -z $known || $known == "$SLURM_JOB_ID" ]] || JOB=$SLURM_JOB_ID
say() { echo "[$(date '+%F %T')] job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }
fail() { echo "error: $*" >&2; exit 2; }

if [[ -z $PYTHON ]]; then
    if [[ -z $CONTAINER && -x .venv/bin/python ]]; then PYTHON=$REPO/.venv/bin/python; else PYTHON=python3; fi
fi
[[ $JOBS_DIR == /* ]] || JOBS_DIR=$REPO/$JOBS_DIR
JOB_DIR=$JOBS_DIR/$SLURM_JOB_ID
TASKS=${SLURM_NTASKS_PER_NODE:-1}
TASKS=${TASKS%%(*}
CPUS=${SLURM_CPUS_PER_TASK:-1}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
# The first node is where the shell runs. Ports differ from job to job, and from start to start: the one before may linger.
export MASTER_ADDR=${HOSTS%% *} MASTER_PORT=$((10000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} % 8) % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS} PYTHONUNBUFFERED=1
export RECYCLE_JOB_DIR=$JOB_DIR RECYCLE_JOB=$JOB TASKS HOSTS PYTHON REQUEUE
unset RECYCLE_SHELL

# What SLURM knows beats the variable, which older releases lack and a job submitted from within a job inherits.
end=$(job_field EndTime || true)
if [[ -n $end ]] && end=$(date -d "$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi

# One task's failure ends the others; one that has finished does not, whatever the site's WaitTime.
SRUN=(srun --kill-on-bad-exit=1 --wait=0)
WRAP=() # where it is empty, bash before 4.4 takes "${WRAP[@]}" for an unset variable: hence ${WRAP[@]+"${WRAP[@]}"}
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
    local ranks=(--ntasks="$((SLURM_JOB_NUM_NODES * TASKS))" --ntasks-per-node="$TASKS" --cpus-per-task="$CPUS")
    local nodes=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$((CPUS * TASKS))")
    case $LAUNCHER in
        srun) exec "${SRUN[@]}" "${ranks[@]}" ${WRAP[@]+"${WRAP[@]}"} "$PYTHON" -m "$@" ;;
        torchrun | deepspeed) exec "${SRUN[@]}" "${nodes[@]}" ${WRAP[@]+"${WRAP[@]}"} bash slurm/node.sh "$LAUNCHER" "$@" ;;
        # shellcheck disable=SC2086 # a command with its options
        mpirun) exec $MPIRUN -n "$((SLURM_JOB_NUM_NODES * TASKS))" ${WRAP[@]+"${WRAP[@]}"} "$PYTHON" -m "$@" ;;
        *) fail "LAUNCHER=$LAUNCHER: must be srun, torchrun, deepspeed or mpirun" ;;
    esac
}

# alone TOOL [ARGUMENT ...]: a short Python program of the repository, where its packages are.
alone() {
    if [[ $CONTAINER == pyxis ]]; then
        "${SRUN[@]}" --overlap --nodes=1 --ntasks=1 "$PYTHON" "$@"
    else
        ${WRAP[@]+"${WRAP[@]}"} "$PYTHON" "$@"
    fi
}

# run_and_requeue MODULE [ARGUMENT ...]: runs the ranks, and does what their end asks for. It ends the job.
run_and_requeue() {
    mkdir -p "$JOB_DIR"
    rm -f "$JOB_DIR"/{stop,outcome,error} || say "$JOB_DIR cannot be tidied up"
    if note shell "$(hostname) $$"; then export RECYCLE_SHELL="$(hostname) $$"; fi
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

# A full disk must not end the job.
note() { echo "$2" >"$JOB_DIR/$1" || { say "$JOB_DIR/$1 cannot be written"; return 1; }; }

# Whether the folder is a later start's, this node having been lost from SLURM's sight only: what is in it is not for this one.
replaced() {
    local holder
    holder=$(cat "$JOB_DIR/shell" 2>/dev/null || true)
    [[ -n $holder && $holder != "${RECYCLE_SHELL:-$holder}" ]]
}

# No signal goes to a launcher, which would end the ranks: the first rank finds the file at its next step.
ask_to_stop() {
    stopping=$1
    if replaced; then say "got $1: the job goes on elsewhere"; return; fi
    say "got $1: the run is asked to save and to leave"
    note stop "$1" || true
}

after() {
    local code=$1 outcome
    if replaced; then say "the ranks left with exit code $code; the job goes on elsewhere"; requeued=1; exit 75; fi
    outcome=$(cat "$JOB_DIR/outcome" 2>/dev/null || true)
    say "the ranks left with exit code $code, outcome: ${outcome:-none}"
    case $outcome in
        finished) rm -rf "$JOB_DIR"; exit 0 ;;
        left) say "stopped for good, as a person asked"; rm -rf "$JOB_DIR"; exit 0 ;;
        failed) say "given up: $(cat "$JOB_DIR/error" 2>/dev/null || echo 'the error is above')"; exit 1 ;;
        # where a rank crashed, the signal that ended the others was srun's own
        stopped) [[ $code != 0 && -z $stopping ]] || again "stopped" ;;
    esac
    [[ -z $stopping && $code != 75 ]] || again "stopped"
    [[ $code != 0 ]] || exit 0
    crashed "$code"
}

# A crash that came further than the one before may have been a node's fault; one that comes again at the same place is not.
crashed() {
    local code=$1 progress count=0 before=
    # a requeue of SLURM's own ends the ranks too
    [[ $(job_field JobState || true) =~ ^(RUNNING|)$ ]] || again "ended by SLURM"
    progress=$(cat "$JOB_DIR/progress" 2>/dev/null || echo 0)
    read -r count before 2>/dev/null <"$JOB_DIR/crashes" || true
    if [[ ${before:-} == "$progress" ]]; then count=$((count + 1)); else count=1; fi
    if ! note crashes "$count $progress" && ((${SLURM_RESTART_COUNT:-0} + 1 >= MAX_CRASHES)); then
        say "given up: exit code $code after ${SLURM_RESTART_COUNT:-0} restarts, and crashes cannot be counted in $JOB_DIR"
        exit 1
    fi
    summary
    if ((count >= MAX_CRASHES)); then
        say "given up: $count crashes in a row with nothing new on disk (last: exit code $code)"
        exit 1
    fi
    again "crash $count of $MAX_CRASHES at this place"
}

# What the run says of itself where it could not do so any more.
summary() {
    local run_dir
    run_dir=$(cat "$JOB_DIR/run_dir" 2>/dev/null) || return 0
    alone tools/summarise_runs.py "$run_dir" || true
}

# Starts the job again, unless a person cancelled it or SLURM has requeued it already. The controller may be busy: it is asked for
# some minutes.
again() {
    [[ $REQUEUE == 1 ]] || { say "$1; REQUEUE=$REQUEUE: not started again"; exit 75; }
    local try state reason restarts said
    for try in 1 2 3 4 5 6 7 8 9 10; do
        state=$(job_field JobState || true)
        reason=$(job_field Reason || true)
        restarts=$(job_field Restarts || true)
        if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
            say "$1; the job has been started again elsewhere: not requeued from here"
            requeued=1
            exit 75
        fi
        case $state:$reason in
            RUNNING:* | PREEMPTED:* | *:TimeLimit)
                say "$1: requeueing"
                if said=$(scontrol requeue "$JOB" 2>&1); then
                    requeued=1
                    # SLURM ends this shell; leaving by itself could be taken for the end of the job
                    sleep 60 & wait $! || true
                    exit 75
                fi
                # anything else may pass: a busy controller, or one that hands over to another
                ! grep -qiE 'disabled|permission|denied|not supported|invalid' <<<"$said" || { say "not requeued: $said"; exit 75; }
                ;;
            PENDING:* | REQUEUED:*) say "$1; SLURM has requeued the job by itself"; requeued=1; exit 75 ;;
            ?*) say "$1; the job is $state ($reason): not requeued from here"; exit 75 ;;
        esac
        say "not requeued yet (try $try): ${said:-the controller does not answer}"
        sleep 20
    done
    say "$1; not requeued: ${said:-the controller did not answer}"
    exit 75
}
