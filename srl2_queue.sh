# seed 2: one whole pass over the 420 pairs (105 steps) of the same RL, then its test answers
bash srl.sh rouge105 2 --temperature 0.7 --learning-rate 1e-3 --epochs 1 --eval-every 105 --save-every 10
OMP_NUM_THREADS=1 .venv/bin/python eosval.py runs/sg_rouge105_2/ppo/policy 2 300 0 test > pol2_105_test.txt 2>&1
