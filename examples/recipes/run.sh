#!/bin/sh
# Makes what docs/results.md says of a hardened SmolLM2-135M: hours of work, in commands that each go on where they were stopped.
#
#     examples/recipes/run.sh                    # all
#     examples/recipes/run.sh train advul-0      # one training
#     examples/recipes/run.sh evaluate advul-0   # and what it came to
#     examples/recipes/run.sh tune advul-0       # the same in the small, on what its training held out
#     examples/recipes/run.sh publish            # figures into docs/records, which the tables and plots are made of
#
# The runs lie in runs/claim. From the top of the repository, with these in the environment, or at these places:
#
#     MODEL       the model's folder (`make .real/ready` writes it)
#     BEHAVIORS   adv_training_behaviors.csv with adv_training_targets.json, adv_training_behaviors_safe_responses.csv,
#                 harmbench_behaviors_text_val.csv and adv_training_val_targets.json beside it
#     SEED_TASKS  Self-Instruct's seed tasks as seed_tasks.py writes them
#     XSTEST      xstest_v2_prompts.csv
#     ARC         ARC-Easy-Test.jsonl, if at hand
#     ATTACKS     those to evaluate with: direct,prefill,embedding,autodan,gcg
#     DTYPE       auto, or bfloat16 on a processor with a matrix unit for it
#     DEVICE      auto, cpu, cuda or cuda:N
#     MICRO_BATCH rows that a training sends through the model at once: the recipe's 16, or all 64 of an update on a GPU
#     CURVE       updates from one point of the curve of a run of seed 0 to the next: 50, or nothing for no curve, which saves a tenth of the time
set -eu
MODEL=${MODEL:-.real/smollm2}
BEHAVIORS=${BEHAVIORS:-data/adv_training_behaviors.csv}
SEED_TASKS=${SEED_TASKS:-data/self_instruct_seed.jsonl}
XSTEST=${XSTEST:-data/xstest_v2_prompts.csv}
ARC=${ARC:-}
ATTACKS=${ATTACKS:-direct,prefill,embedding,autodan,gcg}
DTYPE=${DTYPE:-auto}
DEVICE=${DEVICE:-auto}
MICRO_BATCH=${MICRO_BATCH:-}
CURVE=${CURVE-50}

here=$(dirname "$0")
data=$(dirname "$BEHAVIORS")
runs=runs/claim
example() { program=$1; shift; cargo run --quiet --release --example "$program" -- --dtype "$DTYPE" --device "$DEVICE" "$@"; }

# made_of RECORD PRODUCT: keeps the sum of what is read here in a record of what a product is made of, and stops where the product is
# there and was made of something else.
made_of() {
    sum=$(cksum)
    [ -e "$2" ] || echo "$sum" > "$1"
    [ "$(cat "$1" 2> /dev/null)" = "$sum" ] && return
    echo "$2 was made of other files or settings than it would be now ($1 has their sum); move it away" >&2
    exit 1
}

# needed FILE...: stops where one is not there, since a sum of what is left says nothing.
needed() {
    for file in "$@"; do
        [ -e "$file" ] || { echo "$file: no such file; see the variables at the top of $0" >&2; exit 1; }
    done
}

# whole FILE: writes what is read here, so that no moment has half of it.
whole() {
    cat > "$1.$$"
    mv "$1.$$" "$1"
}

# Of five seed tasks three are there to train on, one to tune on and one to evaluate on.
chats() {
    needed "$SEED_TASKS"
    awk 'NR % 5 == 0' "$SEED_TASKS" | whole $runs/chats_to_tune_on.jsonl
    awk 'NR % 5 == 1' "$SEED_TASKS" | whole $runs/chats_to_evaluate_on.jsonl
}

requests_to_tune_on() {
    cat examples/data/harmless_held_out.txt examples/data/sounding_held_out.txt | whole $runs/requests_to_tune_on.txt
}

# The model's own answers to our harmless requests, to those that sound harmful, and to requests that it writes itself; and the
# seed tasks to train on, five times each: they are few, and the rows that people wrote.
utility() {
    requests="examples/data/harmless_training.txt examples/data/harmless_twins.txt examples/data/sounding_training.txt"
    drawn=640
    needed "$MODEL/config.json" "$MODEL"/*.safetensors
    { echo "$drawn"; cat $requests "$MODEL"/*.json "$MODEL"/*.safetensors; } | made_of $runs/own_answers.made_of $runs/own_answers.jsonl
    [ -e $runs/own_answers.jsonl ] || example self_distil --model "$MODEL" --requests "$(echo $requests | tr ' ' ,)" \
        --drawn $drawn --rows 32 --out $runs/own_answers.jsonl
    for copy in 1 2 3 4 5; do
        awk 'NR % 5 > 1' "$SEED_TASKS" | sed "s/\"prompt_id\": *\"/&$copy-/" # ids are unique
    done | cat - $runs/own_answers.jsonl | whole $runs/utility.jsonl
}

# The card of the adapter is the last that a training writes.
finished() { [ -e "$1/adapter/README.md" ]; }

# A run is called RECIPE-SEED, or after the number in which it differs from C-AdvUL's recipe.
train() {
    case $1 in
        epsilon-*) set -- "$1" advul --epsilon "${1#epsilon-}" ;;
        share-*) set -- "$1" advul --utility-share "${1#share-}" ;;
        *-0) set -- "$1" "${1%-*}" ${CURVE:+--curve "$CURVE"} ;;
        *-[1-9]*) set -- "$1" "${1%-*}" --seed "${1##*-}" ;;
        *) usage ;;
    esac
    name=$1 recipe=$2
    shift 2
    [ -e "$here/$recipe.toml" ] || usage
    chats
    utility
    requests_to_tune_on
    mkdir -p "$runs/$name"
    targets=$data/adv_training_targets.json refusals=$data/adv_training_behaviors_safe_responses.csv
    needed "$BEHAVIORS" "$targets" "$refusals"
    # A curve changes nothing in the run.
    {
        echo "$DTYPE" "$@" | sed 's/ --curve [0-9]*//'
        cat "$here/$recipe.toml" $runs/utility.jsonl $runs/chats_to_tune_on.jsonl $runs/requests_to_tune_on.txt
        cat "$BEHAVIORS" "$targets" "$refusals"
    } | made_of "$runs/$name/made_of" "$runs/$name/run.toml"
    ! finished "$runs/$name" || return 0
    # What another run measured before its training is taken where it is of the same rows, and measured anew where not.
    [ -e "$runs/$name/before.json" ] || whole "$runs/$name/before.json" 2> /dev/null < $runs/advul-0/before.json || true
    # The recipe's file says which loss it is; the two examples differ in their toys alone.
    example advul --config "$here/$recipe.toml" --model "$MODEL" --behaviors "$BEHAVIORS" \
        --targets "$targets" --refusals "$refusals" \
        --utility $runs/utility.jsonl --harmless $runs/chats_to_tune_on.jsonl --harmless-requests $runs/requests_to_tune_on.txt \
        --measured 200 --measured-epsilon 0.1 --out "$runs/$name" ${MICRO_BATCH:+--micro-batch-size "$MICRO_BATCH"} "$@"
}

# Behaviours, requests and chats that were neither trained nor tuned on.
evaluate() {
    name=$1
    shift
    chats
    harmless=examples/data/harmless_validation.txt
    example evaluate --model "$MODEL" --name "$name" --category standard --settings "$here/evaluation.toml" \
        --behaviors "$data/harmbench_behaviors_text_val.csv" --targets "$data/adv_training_val_targets.json" \
        --attacks "$ATTACKS" --search-cases 16 \
        --utility "${ARC:+arc=$ARC,}xstest=$XSTEST,requests=$harmless,strings=$harmless,chats=$runs/chats_to_evaluate_on.jsonl" \
        --out "$runs/evaluation-$name" "$@"
}

# What tells recipes apart before they are evaluated: the behaviours that the training held out, a fifth of GCG's search, and the
# chats and requests to tune on.
tune() {
    chats
    requests_to_tune_on
    sed 's/^steps = 50$/steps = 20/; s/^width = 64$/width = 32/' "$here/evaluation.toml" | whole $runs/tuning.toml
    [ "$(diff "$here/evaluation.toml" $runs/tuning.toml | grep -c '^>')" = 2 ] ||
        { echo "$here/evaluation.toml: its search is no longer 64 candidates in 50 steps, of which \`tune\` takes a fifth" >&2; exit 1; }
    set -- "$1" --behaviors "$BEHAVIORS" --targets "$data/adv_training_targets.json" --held-out 0.1 --attacks direct,gcg \
        --settings $runs/tuning.toml --out "$runs/tuning-$1" \
        --utility "requests=$runs/requests_to_tune_on.txt,strings=$runs/requests_to_tune_on.txt,chats=$runs/chats_to_tune_on.jsonl"
    case $1 in
        untrained) ;;
        epsilon-* | share-*) set -- "$@" --adapter "$runs/$1/adapter" ;;
        *) set -- "$@" --held-out-seed "${1##*-}" --adapter "$runs/$1/adapter" ;;
    esac
    name=$1
    shift
    example evaluate --model "$MODEL" --name "$name" "$@"
}

before() { evaluate untrained; }

# Beside the untrained model, so that the report says in what the two were not treated alike.
after() { evaluate "$1" --adapter "$runs/$1/adapter" --with "$runs/evaluation-untrained"; }

# An evaluation that was stopped has a report too, of what there is.
evaluated() {
    [ -e "$1/report.json" ] &&
        awk '/"planned":/ { planned = $2 + 0 } /"done":/ && $2 + 0 < planned { part = 1 } END { exit part }' "$1/report.json"
}

# Of what has come to its end. The records of an evaluation hold the behaviours' own texts, which are others', and stay.
publish() {
    for folder in "$runs"/*/; do
        finished "$folder" || evaluated "$folder" || continue
        kept=docs/records/$(basename "$folder")
        rm -rf "$kept"
        mkdir -p "$kept"
        for file in run.toml metrics.jsonl curve.jsonl before.json after.json report.json; do
            [ ! -e "$folder$file" ] || cp "$folder$file" "$kept/"
        done
    done
}

usage() {
    sed '1d; /^set/,$d' "$0" >&2
    exit 2
}

mkdir -p $runs
case ${1:-all} in
    train) [ $# = 2 ] || usage; train "$2" ;;
    tune) [ $# = 2 ] || usage; tune "$2" ;;
    evaluate) [ $# = 2 ] || usage; if [ "$2" = untrained ]; then before; else after "$2"; fi ;;
    publish) publish ;;
    all)
        before
        for name in advul-0 advipo-0 no_attack-0 one_step-0 advul-1 advul-2 advipo-1 advipo-2; do
            train $name
            after $name
        done
        for name in epsilon-0.025 epsilon-0.05 epsilon-0.15 epsilon-0.2 share-0.5 share-0.75 share-0.95; do
            train $name
        done
        ;;
    *) usage ;;
esac
