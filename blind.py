import json, random, glob, csv
a=json.load(open('runs_sm2_mle_test_300_6_0.0.json')); b=json.load(open('runs_sg_rouge_2_ppo_policy_test_300_6_0.0.json'))
from training import command_line
from training.inputs import load_examples
_, s, _ = command_line.read(["judge", "--data", "/work/shared/data/samsum", "--output-dir", "runs/x", "--model", "runs/smol/base"])
src={e.id:(e.source,e.target) for e in load_examples(s,"test")}
rng=random.Random(7); rows=rng.sample(range(300),24); key={}
for n,i in enumerate(rows):
    d,t=src[a['ids'][i]]
    two=[('mle',a['texts'][i]),('rl',b['texts'][i])]; rng.shuffle(two); key[n]=[x[0] for x in two]
    print(f"#{n}\n{d}\n  A: {two[0][1]}\n  B: {two[1][1]}\n")
json.dump(key,open('blind_key.json','w'))
