# Sourced by the *.sbatch files, which run in the repository's root: finds Python, starts the ranks, and requeues the job after a
# stop request or a crash. The job's shell and the ranks exchange files in $JOB_DIR (recycle_ds/parallel/job.py).
# shellcheck shell=bash

# Exit code of a job that is to run again (EX_TEMPFAIL): it has been requeued, or REQUEUE=0 leaves that to the user. Ranks exit
# with it when they have saved and could not write their outcome (REQUEUE_EXIT_CODE in recycle_ds/parallel/job.py).
readonly EXIT_REQUEUE=75
readonly EXIT_USER_ERROR=2

REPO=${SLURM_SUBMIT_DIR:?submit with sbatch from the root of the repository}
[[ -f $REPO/slurm/common.sh ]] || { echo "error: $REPO is not the root of the repository: cd there, then sbatch" >&2; exit $EXIT_USER_ERROR; }
cd "$REPO"
# shellcheck source=/dev/null
if [[ -f slurm/site.env ]]; then source slurm/site.env; fi
# shellcheck source=defaults.env
source slurm/defaults.env

# What scontrol calls this job: the number alone may stand for all tasks of an array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
# SLURM_TIME_FORMAT of the user's environment would change how scontrol prints times.
job_field() { SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$JOB" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2; }
# A job that was submitted from within a task of an array inherits that array's number.
known=$(job_field JobId || true)
[[ -z $known || $known == "$SLURM_JOB_ID" ]] || JOB=$SLURM_JOB_ID
say() { echo "[$(date '+%F %T')] job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }
fail() { echo "error: $*" >&2; exit $EXIT_USER_ERROR; }

if [[ -z $PYTHON ]]; then
    if [[ -z $CONTAINER && -x .venv/bin/python ]]; then PYTHON=$REPO/.venv/bin/python; else PYTHON=python3; fi
fi
[[ $JOBS_DIR == /* ]] || JOBS_DIR=$REPO/$JOBS_DIR
JOB_DIR=$JOBS_DIR/$SLURM_JOB_ID
# shellcheck source=tasks.sh
source slurm/tasks.sh
count_tasks
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

case $LAUNCHER in
    srun | torchrun | deepspeed | mpirun) ;;
    *) fail "LAUNCHER=$LAUNCHER: must be srun, torchrun, deepspeed or mpirun" ;;
esac
case $LAUNCHER in
    torchrun | deepspeed)
        [[ -n $EVEN ]] || fail "$RANKS tasks on $SLURM_JOB_NUM_NODES nodes (${SLURM_TASKS_PER_NODE:-}): LAUNCHER=$LAUNCHER needs as many on every node: submit with --ntasks-per-node"
        ;;
esac

# launch MODULE [ARGUMENT ...]: all ranks of the job. The GPUs that SLURM gave to a step stay as they are.
launch() {
    local ranks nodes
    mapfile -t ranks < <(rank_options)
    mapfile -t nodes < <(launcher_options)
    unset SLURM_CPUS_PER_GPU # srun would take it for a second number of CPUs
    case $LAUNCHER in
        torchrun | deepspeed) unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND ;;
    esac
    case $LAUNCHER in
        srun) exec "${SRUN[@]}" "${ranks[@]}" ${WRAP[@]+"${WRAP[@]}"} "$PYTHON" -m "$@" ;;
        torchrun | deepspeed) exec "${SRUN[@]}" "${nodes[@]}" ${WRAP[@]+"${WRAP[@]}"} bash slurm/node.sh "$LAUNCHER" "$@" ;;
        # shellcheck disable=SC2086 # a command with its options
        mpirun) exec $MPIRUN -n "$RANKS" ${WRAP[@]+"${WRAP[@]}"} "$PYTHON" -m "$@" ;;
    esac
}

# run_tool TOOL [ARGUMENT ...]: one process of a tool of the repository, inside the container if there is one.
run_tool() {
    if [[ $CONTAINER == pyxis ]]; then
        "${SRUN[@]}" --overlap --nodes=1 --ntasks=1 "$PYTHON" "$@"
    else
        ${WRAP[@]+"${WRAP[@]}"} "$PYTHON" "$@"
    fi
}

# run_and_requeue MODULE [ARGUMENT ...]: runs the ranks, then ends or requeues the job according to how they ended. Never returns.
run_and_requeue() {
    run_ranks "$@"
    end_job "$code"
}

# run_step MODULE [ARGUMENT ...]: runs the ranks of a step that others follow. Returns if they have finished; if not, ends or requeues
# the job. A restarted job runs the step again, so a finished one must end at once.
run_step() {
    local outcome
    run_ranks "$@"
    outcome=$(cat "$JOB_DIR/outcome" 2>/dev/null || true)
    if replaced || [[ $code != 0 || ${outcome:-finished} != finished || -f $JOB_DIR/error ]]; then end_job "$code"; fi
    rm -f "$JOB_DIR/outcome" || say "$JOB_DIR cannot be tidied up"
    [[ -z $stopping ]] || requeue "stopped between two steps"
    MASTER_PORT=$((MASTER_PORT + 3)) # the one of this step may linger
}

# Prepares the job's folder and the signals, once for all steps: a signal between two of them is not lost.
start_job() {
    mkdir -p "$JOB_DIR"
    rm -f "$JOB_DIR"/{stop,outcome,error} || say "$JOB_DIR cannot be tidied up"
    if write_note shell "$(hostname) $$"; then export RECYCLE_SHELL="$(hostname) $$"; fi
    stopping=
    trap 'ask_to_stop USR1' USR1
    trap 'ask_to_stop TERM' TERM
}

# run_ranks MODULE [ARGUMENT ...]: starts the ranks and waits for them. Sets `code`, with which they exited.
run_ranks() {
    [[ -n ${stopping+set} ]] || start_job
    say "$LAUNCHER, $RANKS rank(s) on $SLURM_JOB_NUM_NODES node(s): $*"
    launch "$@" &
    local child=$!
    code=0
    # a trap runs when `wait` is interrupted, never in the middle of a foreground command
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    if [[ -n $stopping ]]; then code=0; wait "$child" || code=$?; fi
}

# write_note NAME TEXT: a file in $JOB_DIR. A full disk must not end the job.
write_note() { echo "$2" >"$JOB_DIR/$1" || { say "$JOB_DIR/$1 cannot be written"; return 1; }; }

# Whether a later start of the job owns $JOB_DIR: SLURM had lost sight of this node and started the job elsewhere.
replaced() {
    local holder
    holder=$(cat "$JOB_DIR/shell" 2>/dev/null || true)
    [[ -n $holder && $holder != "${RECYCLE_SHELL:-$holder}" ]]
}

# The launcher gets no signal, which would kill the ranks: the first rank sees the file at its next step.
ask_to_stop() {
    stopping=$1
    if replaced; then say "got $1: the job has been started elsewhere"; return; fi
    say "got $1: the run is asked to save and exit"
    write_note stop "$1" || true
}

# Ends the job after the ranks have exited: finished, given up, or requeued.
end_job() {
    local code=$1 outcome
    if replaced; then say "the ranks exited with code $code; the job has been started elsewhere"; requeued=1; exit $EXIT_REQUEUE; fi
    outcome=$(cat "$JOB_DIR/outcome" 2>/dev/null || true)
    say "the ranks exited with code $code, outcome: ${outcome:-none}"
    case $outcome in
        finished)
            code=0
            # of a file of prompts, some could not be continued
            if [[ -f $JOB_DIR/error ]]; then code=1; say "finished with errors: $(cat "$JOB_DIR/error")"; fi
            rm -rf "$JOB_DIR"
            exit "$code"
            ;;
        stopped_by_user) say "stopped by the user; not requeued"; rm -rf "$JOB_DIR"; exit 0 ;;
        failed) say "given up: $(cat "$JOB_DIR/error" 2>/dev/null || echo 'the error is above')"; exit 1 ;;
        # where a rank crashed, the signal that ended the others came from srun
        saved_for_restart) [[ $code != 0 && -z $stopping ]] || requeue "stopped" ;;
    esac
    [[ -z $stopping && $code != "$EXIT_REQUEUE" ]] || requeue "stopped"
    [[ $code != 0 ]] || exit 0
    handle_crash "$code"
}

# Counts crashes in a row without a new checkpoint in between: after MAX_CRASHES of them the job is given up, else requeued.
handle_crash() {
    local code=$1 progress count=0 before=
    # a requeue of SLURM's own ends the ranks too
    [[ $(job_field JobState || true) =~ ^(RUNNING|)$ ]] || requeue "ended by SLURM"
    progress=$(cat "$JOB_DIR/progress" 2>/dev/null || echo 0)
    read -r count before 2>/dev/null <"$JOB_DIR/crashes" || true
    if [[ ${before:-} == "$progress" ]]; then count=$((count + 1)); else count=1; fi
    if ! write_note crashes "$count $progress" && ((${SLURM_RESTART_COUNT:-0} + 1 >= MAX_CRASHES)); then
        say "given up: exit code $code after ${SLURM_RESTART_COUNT:-0} restarts, and crashes cannot be counted in $JOB_DIR"
        exit 1
    fi
    print_summary
    if ((count >= MAX_CRASHES)); then
        say "given up: $count crashes in a row without a new checkpoint (last exit code: $code)"
        exit 1
    fi
    requeue "crash $count of $MAX_CRASHES without a new checkpoint"
}

# The run's summary, which the run itself could not print.
print_summary() {
    local run_dir
    run_dir=$(cat "$JOB_DIR/run_dir" 2>/dev/null) || return 0
    run_tool tools/summarise_runs.py "$run_dir" || true
}

# requeue REASON: puts the job back into the queue, unless a user cancelled it or SLURM has requeued it already. A busy controller
# is asked again for some minutes. Never returns.
requeue() {
    [[ $REQUEUE == 1 ]] || { say "$1; REQUEUE=$REQUEUE: not requeued"; exit $EXIT_REQUEUE; }
    local try state reason restarts answer
    for try in 1 2 3 4 5 6 7 8 9 10; do
        state=$(job_field JobState || true)
        reason=$(job_field Reason || true)
        restarts=$(job_field Restarts || true)
        if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
            say "$1; the job has been started elsewhere: not requeued from here"
            requeued=1
            exit $EXIT_REQUEUE
        fi
        case $state:$reason in
            RUNNING:* | PREEMPTED:* | *:TimeLimit)
                say "$1: requeueing"
                if answer=$(scontrol requeue "$JOB" 2>&1); then
                    requeued=1
                    # SLURM ends this shell; exiting first could be taken for the end of the job
                    sleep 60 & wait $! || true
                    exit $EXIT_REQUEUE
                fi
                # anything else may pass: a busy controller, or one that hands over to another
                ! grep -qiE 'disabled|permission|denied|not supported|invalid' <<<"$answer" || { say "not requeued: $answer"; exit $EXIT_REQUEUE; }
                ;;
            PENDING:* | REQUEUED:*) say "$1; SLURM has already requeued the job"; requeued=1; exit $EXIT_REQUEUE ;;
            ?*) say "$1; the job is $state ($reason): not requeued from here"; exit $EXIT_REQUEUE ;;
        esac
        say "not requeued yet (try $try): ${answer:-the controller does not answer}"
        sleep 20
    done
    say "$1; not requeued: ${answer:-the controller did not answer}"
    exit $EXIT_REQUEUE
}
