export OMP_NUM_THREADS=1
G() { # name, run, flags
 name=$1; run=$2; shift 2
 D=runs/g_$name; [ -e $D/ppo ] && return
 mkdir -p $D; [ -e $D/mle ] || ln -s ../$run/mle $D/mle; [ -e $D/base ] || ln -s ../toy/base $D/base
 .venv/bin/python lastmile.py group --data toy --output-dir $D --train-examples 100 --seed 1 --eval-every 50 --eval-examples 200 --overwrite "$@" > $D/group.log 2>&1
 echo "$name: $*"; grep before $D/group.log; cut -c1-200 $D/ppo/validation.jsonl
}
G h1_rouge_1e-3 h1 --reward rouge --epochs 8 --learning-rate 1e-3
G h1_agree_1e-3 h1 --no-labelled --more-inputs 800 --learning-rate 1e-3
G h1_mix_1e-3 h1 --more-inputs 800 --epochs 1 --learning-rate 1e-3
G h1_rouge_3e-4 h1 --reward rouge --epochs 8 --learning-rate 3e-4
G h1_rougetruth_1e-3 h1 --reward rouge --truth 0.1 --epochs 8 --learning-rate 1e-3
