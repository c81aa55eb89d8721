export OMP_NUM_THREADS=1
S="--data /work/shared/data/samsum --max-input-tokens 200 --dtype bfloat16 --model runs/smol/base"
while [ ! -e runs/smol/base ]; do sleep 3; done
for seed in 2 3; do
 D=runs/s$seed; mkdir -p $D; [ -e $D/base ] || ln -s ../smol/base $D/base
 [ -e $D/mle ] || .venv/bin/python lastmile.py mle $S --output-dir $D --seed $seed --train-examples 420 --learning-rate 3e-3 --epochs 3 --eval-every 60 --eval-examples 100 --keep best > $D/mle.log 2>&1
done
