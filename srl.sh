# RL from MLE: name seed flags...
export OMP_NUM_THREADS=1
S="--data /work/shared/data/samsum --max-input-tokens 200 --dtype bfloat16 --model runs/smol/base"
name=$1; seed=$2; shift 2
D=runs/sg_${name}_$seed; mkdir -p $D; [ -e $D/base ] || ln -s ../smol/base $D/base; [ -e $D/mle ] || ln -s ../sm$seed/mle $D/mle
[ -e $D/ppo ] || .venv/bin/python lastmile.py group $S --output-dir $D --seed $seed --train-examples 420 --eval-examples 100 --overwrite "$@" > $D/group.log 2>&1
