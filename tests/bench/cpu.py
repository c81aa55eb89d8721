"""`make bench`: sampling and a step of each stage on one CPU thread (or --threads), beside what people use.

C1  sampling, 7 prompts of 200 tokens, 50 new ones each: model.sample against transformers' generate (sdpa; of its
    dynamic and its static cache the one that is faster here), greedily, at temperature 1, and there under a LoRA
    adapter, which for transformers is PEFT's. No EOS exists, so that both take the same steps.
C2  a step of maximum likelihood on 7 x (200 + 50) tokens, LoRA of rank 32 on all projections: ours against
    transformers + PEFT as people write it (labels with -100, hence logits everywhere; AdamW; the norm clipped at 1).
C3  a PPO update on 7 x (200 + 50) given tokens, sampling apart: ours (policy, value adapter of its own, reward model,
    statistics) against TRL 0.11.4's PPOTrainer.step, the last there was (one epoch, one minibatch, policy by PEFT with
    a value head on the same trunk; no reward model, scores are given; KL to the base, which we take every 10th step).
C4  the reward stage on 7 data of SAMSum's lengths, six rows each, 14 rows a step: an update on every one of the 42 rows
    with prompts shared by all six rows (the default), by three, and by none, against transformers + PEFT as
    people write it (a linear head on every token, the rows padded). Peak memory beside it.
C5  bf16 beside fp32, both ours: a step of C2 and the sampling of C1, on a CPU that multiplies bf16 in hardware; on
    another it is left out.

Both sides have the same random weights, ours in 4 bits: tiny Llamas of llama2.c's sizes with a vocabulary of 32,000.
First asserted are the same greedy tokens (C1), the same losses to 1e-4 over three updates (C2), the same
log-probabilities to 1e-4 (C3), the same loss to 1e-4 (C4).

Each side multiplies as its users' programs do: ours by oneDNN (speed.cpu.prefer_onednn), theirs
by torch's default. The last column says what is left where the peer is given the same switch.

    .venv-bench/bin/python tests/bench/cpu.py [--sizes 15M,42M] [--only C1,C2] [--runs 3] [--seconds 60] [--threads 1]
"""

import argparse
import itertools
import json
import multiprocessing
import random
import tempfile
import warnings
from functools import partial
from pathlib import Path

import common
import peft
import steps
import torch
import transformers

import data
import lastmile
import lora
import model
import ppo
from speed import shared_prompts
from speed.cpu import multiplies_bf16

B, PROMPT, NEW = 7, 200, 50
GOALS = {  # id: {size: (goal, stretch)}
    "C1": {"15M": (2.0, 2.5), "42M": (1.3, 1.5)},
    "C2": {"15M": (1.9, 2.2), "42M": (1.15, 1.3)},
    "C3": {"15M": (2.0, 2.5)},
    "C4": {"15M": (4.0, 4.5), "42M": (4.0, 4.5)},
    "C5": {"42M": ()},  # no goal
}
HEADER = ["CPU", "ours, s", "theirs, s", "laps", "speedup", "quartiles", "goal", "stretch",
          "over theirs by oneDNN"]  # fmt: skip


def twin(llama):
    """The same Llama in transformers, its 4-bit weights written out in fp32, as we keep them on a CPU."""
    c = llama.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")  # fmt: skip
    config = transformers.LlamaConfig(**{name: getattr(c, name) for name in names}, attn_implementation="sdpa")
    theirs = transformers.LlamaForCausalLM(config).eval()
    tensors = {name: t for name, t in llama.state_dict().items() if "_proj" not in name and "score" not in name}
    tensors |= {f"{path}.weight": layer.base.weight(torch.float32).T for path, layer in lora.lora_layers(llama)}
    missing = theirs.load_state_dict(tensors, strict=False)
    assert missing == (["lm_head.weight"], []), missing  # the tied head
    theirs.tie_weights()
    return theirs


def with_adapter(theirs, llama, name):
    """transformers' model under the same adapter, by way of a PEFT folder."""
    with tempfile.TemporaryDirectory() as folder:
        llama.save_adapter(name, folder, "tiny")
        return peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)


def line(id, size, what, ours, theirs, seconds, results, note=""):
    """Race two functions; adds a line to the results, with its row of the table."""
    both = {"ours": common.by_onednn(ours), "theirs": theirs, "theirs by oneDNN": common.by_onednn(theirs)}
    add_line(id, size, what, *common.race(both, seconds).values(), results, note)


def add_line(id, size, what, ours, theirs, switched, results, note=""):
    """A line from the laps of ours, of theirs, and of theirs given our switch."""
    ratio = common.speedup(ours, theirs)
    key = f"{id} {size} {what}".strip()
    laps = {"ours": ours, "theirs": theirs, "theirs by oneDNN": switched}
    results[key] = laps | {"speedup": ratio, "over theirs by oneDNN": common.speedup(ours, switched), "note": note}
    show = lambda values: "{min:.3f} ({q1:.3f}-{q3:.3f})".format(**common.summary(values))  # noqa: E731
    goal = [f"{x:g}x" for x in GOALS[id].get(size, ())] or ["", ""]
    results[key]["row"] = [
        key, show(ours), show(theirs), str(len(ours)), f"{ratio['of minima']:.2f}x",
        f"{ratio['q1']:.2f}-{ratio['q3']:.2f}", *goal, f"{min(switched) / min(ours):.2f}x",
    ]  # fmt: skip
    print(" | ".join(results[key]["row"]), note, flush=True)


def compare(key, ours, theirs, results, goal=""):
    """A line from the laps of two ways of ours."""
    ratio, row = common.speedup(ours, theirs), [key, f"{min(ours):.3f}", f"{min(theirs):.3f}", str(len(ours))]
    row += [f"{ratio['of minima']:.2f}x", f"{ratio['q1']:.2f}-{ratio['q3']:.2f}", goal, "", ""]
    results[key] = {"ours": ours, "theirs": theirs, "speedup": ratio, "row": row}
    print(" | ".join(row), flush=True)


def c1(size, seconds, results):
    llama = common.tiny_llama(size, packed=True)
    common.add_adapter(llama, "policy")
    prompts = [row.prompt for row in common.random_rows(B, PROMPT, NEW)]
    ids = torch.tensor(prompts)
    theirs = twin(llama)

    def generate(hf, cache, **how):
        settings = transformers.GenerationConfig(
            max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, cache_implementation=cache, **how
        )
        found = hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return found[:, PROMPT:].tolist()

    draw = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    ways = {  # what: (our adapter, our temperature, their model, their settings)
        "greedy": (None, 0, lambda: theirs, dict(do_sample=False)),
        "sampled": (None, 1, lambda: theirs, draw),
        "sampled, LoRA": ("policy", 1, lambda: with_adapter(theirs, llama, "policy"), draw),
    }
    trials = common.race({c: lambda c=c: generate(theirs, c, do_sample=False) for c in ("dynamic", "static")}, most=5)
    cache = min(trials, key=lambda c: min(trials[c]))
    note = "cache: " + ", ".join(f"{c} {min(laps):.3f} s" for c, laps in trials.items())
    for what, (adapter, temperature, build, how) in ways.items():
        hf = build()
        expected = generate(hf, cache, do_sample=False)
        assert model.sample(llama, prompts, adapter, NEW, 0) == expected, f"{size}, {what}: not the same tokens"
        assert len({token for row in expected for token in row}) > NEW, "greedy answers too uniform to tell anything"
        ours = lambda a=adapter, t=temperature: model.sample(llama, prompts, a, NEW, t)  # noqa: E731
        peers = lambda hf=hf, how=how: generate(hf, cache, **how)  # noqa: E731
        line("C1", size, what, ours, peers, seconds, results, note)


def c2(size, seconds, results):
    llama = common.tiny_llama(size, packed=True)
    common.add_adapter(llama, "mle")
    theirs = with_adapter(twin(llama), llama, "mle")
    rows = common.random_rows(B, PROMPT, NEW)
    batch = data.collate(rows)
    ours = steps.step("mle", llama, batch, steps.settings("mle"))
    learned = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-5, weight_decay=0.0)
    labels = batch.tokens.masked_fill(~batch.mask, -100)

    def peers():
        loss = theirs(input_ids=batch.tokens, attention_mask=torch.ones_like(batch.tokens), labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item(), norm.item()

    for _ in range(3):  # the updates agree, too
        numbers, (their_loss, their_norm) = ours(), peers()
        loss, norm = numbers["loss"], numbers["grad_norm"]
        assert abs(loss - their_loss) < 1e-4 and abs(norm / their_norm - 1) < 1e-3, (loss, their_loss, norm, their_norm)
    line("C2", size, "", ours, peers, seconds, results)


def c3(size, seconds, results):
    import trl

    llama = common.tiny_llama(size, packed=True)
    settings = steps.settings("ppo")
    steps.add_adapters("ppo", llama, settings)
    hf = trl.AutoModelForCausalLMWithValueHead.from_pretrained(with_adapter(twin(llama), llama, "policy"))
    batch = data.collate(common.random_rows(B, PROMPT, NEW))
    config = trl.PPOConfig(batch_size=B, mini_batch_size=B, ppo_epochs=1, learning_rate=1e-5)
    trainer = trl.PPOTrainer(config, hf, tokenizer=any_tokenizer())
    queries, responses = list(batch.tokens[:, :PROMPT]), list(batch.tokens[:, PROMPT:])
    scores = list(torch.randn(B, generator=torch.Generator().manual_seed(0)))
    ours = steps.step("ppo", llama, batch, settings)

    with torch.no_grad():
        inputs = trainer.prepare_model_inputs(queries, responses)
        logp, *_ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        error = (logp[:, PROMPT - 1 :] - ppo.actor_critic(llama, batch)[0][:, PROMPT:]).abs().max()
        assert error < 1e-4, f"log-probabilities differ by {error}"
    peers = lambda: trainer.step(queries, responses, scores)  # noqa: E731
    learned = llama.adapter_parameters("policy"), [p for name, p in hf.named_parameters() if "lora_" in name]
    before = [[p.detach().clone() for p in side] for side in learned]
    numbers, _ = ours(), peers()
    assert numbers["ratio"] == 1, numbers
    for side, old in zip(learned, before, strict=True):
        assert all((p != q).any() for p, q in zip(side, old, strict=True)), "an adapter did not learn"
    line("C3", size, "", ours, peers, seconds, results)


def samsum_rows(groups=7, V=32000, seed=0):
    """Rows as the reward stage has them on SAMSum: six to a prompt of 230 tokens, outputs of 46, on average."""
    rng = random.Random(seed)

    def tokens(least, most):
        return [rng.randrange(3, V) for _ in range(rng.randint(least, most))]

    rows = []
    for i in range(groups):
        prompt, truth = tokens(150, 310), tokens(14, 42)
        row = data.Datum(str(i), "", "", prompt, truth)
        others = [tokens(len(truth), len(truth)), tokens(14, 42), tokens(len(truth), len(truth)), tokens(40, 100)]
        others.append(tokens(70, 100))
        rows.append(row)
        rows += [data.replace(row, response=other, label=0.0, weight=0.2, kind="x") for other in others]
    return rows


class RewardOfPeers(torch.nn.Module):
    """transformers' Llama under PEFT with a linear head on every token."""

    def __init__(self, llama):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            llama.save_adapter("reward", folder, "tiny")
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            trunk = twin(llama).model
            lora = peft.LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=common.TARGETS)
            self.trunk = peft.get_peft_model(trunk, lora)
        for name, parameter in self.trunk.named_parameters():
            if "lora_" in name:
                path, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
                layer = llama.get_submodule(f"model.{path}")
                parameter.data.copy_((layer.lora_A if kind.startswith("A") else layer.lora_B)["reward"])
        self.score = torch.nn.Linear(llama.config.hidden_size, 1, bias=False)
        self.score.weight.data.copy_(llama.score["reward"])

    def forward(self, tokens, mask):
        h = self.trunk(input_ids=tokens, attention_mask=mask).last_hidden_state  # (B, T, C)
        return self.score(h).squeeze(-1)


def in_child_peak(run):
    """The memory that run() takes at most beyond what is held before it, in a forked process; bytes."""
    reader, writer = multiprocessing.Pipe(False)

    def child():
        torch.set_num_threads(1)  # a fork has none of its parent's other threads, and would wait for them
        before, _ = common.rss()
        run()
        writer.send(common.rss()[1] - before)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    found = reader.recv()
    process.join()
    return found


def c4(size, seconds, results):
    llama = common.tiny_llama(size, packed=True)
    s = steps.settings("reward")
    steps.add_adapters("reward", llama, s)
    theirs = RewardOfPeers(llama)
    rows = samsum_rows()
    ways = {"shared by three": 3, "shared by six": 0, "not shared": 1}  # rows of a prompt that share a batch, 0: all
    batches = {}
    for way, most in ways.items():
        order = itertools.islice(data.epochs(rows, s.batch_size, 0, most), 3)  # an epoch
        batches[way] = [data.collate([rows[i] for i in index]) for index in order]
        assert sum(len(batch.rows) for batch in batches[way]) == len(rows)
    update = lastmile.Optimizer(llama.adapter_parameters("reward"), max_grad_norm=1.0)
    learned = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-5, weight_decay=0.0)

    def ours(way):
        for batch in batches[way]:
            weight = batch.weight.sum().item()
            lastmile.reward_step(llama, batch, update, 1e-5, weight, shared=way != "not shared")

    def peers():
        for batch in batches["not shared"]:
            length = batch.prompt_len + batch.mask.sum(1)  # (B,)
            mask = (torch.arange(batch.tokens.shape[1]) < length[:, None]).long()
            loss = ppo.reward_loss(theirs(batch.tokens, mask), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            adamw.step()
            adamw.zero_grad()

    batch = batches["not shared"][0]
    with torch.no_grad():
        length = batch.prompt_len + batch.mask.sum(1)
        mask = (torch.arange(batch.tokens.shape[1]) < length[:, None]).long()
        layouts = None, shared_prompts.lay_out(batch)
        losses = [ppo.reward_loss(ppo.token_scores(llama, batch, layout), batch).item() for layout in layouts]
        losses.append(ppo.reward_loss(theirs(batch.tokens, mask), batch).item())
    assert max(losses) - min(losses) < 1e-4, losses
    peaks = {}
    for name, run in {**{way: partial(ours, way) for way in ways}, "theirs": peers}.items():
        peaks[name] = in_child_peak(run)
    note = "peak above the models: " + ", ".join(f"{name} {peak / 1e6:.0f} MB" for name, peak in peaks.items())
    laps = common.race(
        {
            **{way: common.by_onednn(partial(ours, way)) for way in ways},
            "theirs": peers,
            "theirs by oneDNN": common.by_onednn(peers),
        },
        seconds,
        least=3,
    )
    for way in ways:
        add_line("C4", size, way, laps[way], laps["theirs"], laps["theirs by oneDNN"], results, note)
    for way in ("shared by three", "shared by six"):
        compare(f"C4 {size} {way} over not shared", laps[way], laps["not shared"], results, "2x")


def c5(size, seconds, results):
    if not multiplies_bf16():
        return print("C5: this CPU has no bf16 products", flush=True)
    rows = common.random_rows(B, PROMPT, NEW)
    ways = {}
    for dtype in (torch.bfloat16, torch.float32):
        llama = common.tiny_llama(size, packed=True, dtype=dtype)
        common.add_adapter(llama, "mle")
        step = steps.step("mle", llama, data.collate(rows), steps.settings("mle"))
        sampled = partial(model.sample, llama, [row.prompt for row in rows], "mle", NEW, 1)
        ways[dtype] = {"mle": step, "sampled, LoRA": sampled}
    (low, fp32) = (ways[dtype]["mle"]()["loss"] for dtype in ways)
    assert abs(low - fp32) < 0.02 * fp32, (low, fp32)
    for what in ("mle", "sampled, LoRA"):
        laps = common.race({str(dtype): common.by_onednn(way[what]) for dtype, way in ways.items()}, seconds)
        compare(f"C5 {size} {what}, bf16 over fp32", *laps.values(), results)


def any_tokenizer():
    """PPOTrainer wants one, and pads with it."""
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="15M,42M")
    parser.add_argument("--only", default="C1,C2,C3,C4,C5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="of everything; the table shows each line's worst")
    parser.add_argument(
        "--seconds", type=float, default=60, help="for the laps of one line; 5 laps at least, 20 at most"
    )
    parser.add_argument("--name", default="cpu", help="of the files of results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # TRL's about its own age
    transformers.logging.set_verbosity_error()
    found, limits, runs = common.facts(), common.ceilings(), []
    for run in range(arguments.runs):
        print(f"run {run + 1} of {arguments.runs}", flush=True)
        results = {}
        for id in arguments.only.split(","):
            for size in [size for size in arguments.sizes.split(",") if size in GOALS[id]]:
                {"C1": c1, "C2": c2, "C3": c3, "C4": c4, "C5": c5}[id](size, arguments.seconds, results)
        runs.append(results)
    worst = {
        key: min((results[key] for results in runs), key=lambda one: one["speedup"]["of minima"]) for key in results
    }
    common.write(arguments.name, found, [HEADER, *(one["row"] for one in worst.values())], ceilings=limits, runs=runs)


if __name__ == "__main__":
    main()
