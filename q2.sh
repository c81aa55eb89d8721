export OMP_NUM_THREADS=1
PY="nice -n 5 .venv/bin/python lastmile.py"
J() { # name, reward
 [ -s runs/h1/judge_$1.txt ] && return
 $PY judge --data toy --output-dir runs/h1 --reward $2 --eval-examples 300 --seed 1 2>&1 | tr '\r' '\n' | grep -A30 "best of N," > runs/h1/judge_$1.txt
 echo "== $1"; grep -E "mean score|agreement|one sample" runs/h1/judge_$1.txt
}
R() { # name, flags
 name=$1; shift
 D=runs/r_h1_$name; mkdir -p $D; [ -e $D/mle ] || ln -s ../h1/mle $D/mle; [ -e $D/base ] || ln -s ../toy/base $D/base
 [ -e $D/reward ] || $PY reward --data toy --output-dir $D --train-examples 100 --seed 1 --overwrite "$@" > $D/reward.log 2>&1
 J $name $D/reward
}
J self runs/h1/mle
R scalar --rounds 8
R like_init_span --head likelihood --init mle --hallucinations span --learning-rate 1e-3 --rounds 4
R like_init_samples --head likelihood --init mle --samples mle --hallucinations sequence --learning-rate 1e-3 --rounds 4
R like_span --head likelihood --hallucinations span --rounds 8
R scalar_init_samples --init mle --samples mle --rounds 4 --learning-rate 1e-3
