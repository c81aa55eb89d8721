export OMP_NUM_THREADS=1
for seed in 1 2 3; do
 D=runs/f$seed; mkdir -p $D; [ -e $D/base ] || ln -s ../toy/base $D/base
 [ -e $D/mle ] || nice -n 2 .venv/bin/python lastmile.py mle --data toy --output-dir $D --seed $seed --train-examples 420 --epochs 12 --eval-every 60 --keep best > $D/mle.log 2>&1
done
