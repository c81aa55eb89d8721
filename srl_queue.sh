# after seed 3's MLE: 105 steps (one pass of 420) of the same RL, then test answers of both
export OMP_NUM_THREADS=1
while [ ! -e runs/sm3/mle ]; do sleep 5; done
bash srl.sh rouge105 3 --temperature 0.7 --learning-rate 1e-3 --epochs 1 --eval-every 105 --save-every 10
.venv/bin/python eosval.py runs/sm3/mle 3 300 0 test > mle3_test.txt 2>&1
.venv/bin/python eosval.py runs/sg_rouge105_3/ppo/policy 3 300 0 test > pol3_test.txt 2>&1
