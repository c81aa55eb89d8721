export OMP_NUM_THREADS=1
PY="nice -n 5 .venv/bin/python lastmile.py"
for k in 11 12 13 14; do
 D=runs/e1_$k; mkdir -p $D; [ -e $D/base ] || ln -s ../toy/base $D/base
 [ -e $D/mle ] || $PY mle --data runs/toy100_1 --model runs/toy/base --output-dir $D --seed $k --learning-rate 3e-3 --epochs 10 --overwrite > $D/mle.log 2>&1
done
E4=runs/e1_11/mle,runs/e1_12/mle,runs/e1_13/mle,runs/e1_14/mle
J() { [ -s runs/h1/judge_$1.txt ] && return
 $PY judge --data toy --output-dir runs/h1 --reward $2 --eval-examples 300 --seed 1 2>&1 | tr '\r' '\n' | grep -A30 "best of N," > runs/h1/judge_$1.txt
 echo "== $1"; cat runs/h1/judge_$1.txt; }
J ensemble $E4
