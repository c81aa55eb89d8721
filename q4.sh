export OMP_NUM_THREADS=1
G() { # name, flags
 name=$1; shift
 D=runs/g_$name; [ -e $D/ppo ] && return
 mkdir -p $D; [ -e $D/mle ] || ln -s ../toy/mle $D/mle; [ -e $D/base ] || ln -s ../toy/base $D/base
 nice -n 5 .venv/bin/python lastmile.py group --data toy --output-dir $D --seed 1 --max-steps 100 --eval-every 50 --eval-examples 300 --overwrite "$@" > $D/group.log 2>&1
 echo "$name: $*"; grep before $D/group.log; cut -c1-200 $D/ppo/validation.jsonl
}
G one_rouge_1e-3_T1 --learning-rate 1e-3
G one_rouge_1e-3_T.6 --learning-rate 1e-3 --temperature 0.6
G one_rouge_3e-4_T1 --learning-rate 3e-4
G one_rouge_3e-3_T1 --learning-rate 3e-3
G one_best_1e-3_T1 --learning-rate 1e-3 --advantage best
