# one epoch of MLE, annealed; seed, nice
export OMP_NUM_THREADS=1
S="--data /work/shared/data/samsum --max-input-tokens 200 --dtype bfloat16 --model runs/smol/base"
D=runs/sm$1; mkdir -p $D; [ -e $D/base ] || ln -s ../smol/base $D/base
[ -e $D/mle ] || nice -n $2 .venv/bin/python lastmile.py mle $S --output-dir $D --seed $1 --train-examples 420 --learning-rate 3e-3 --epochs 1 --eval-every 60 --eval-examples 100 --overwrite > $D/mle.log 2>&1
