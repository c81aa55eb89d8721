"""lastmile: fine-tune a chat model on your own input-output pairs by reinforcement learning, without human feedback.

    python lastmile.py pretrain   a tiny Llama from scratch                    -> <output-dir>/pretrain
    python lastmile.py quantize   a dense Llama to 4 bits, by GPTQ             -> <output-dir>/base
    python lastmile.py reward     a token-level reward model                   -> <output-dir>/reward
    python lastmile.py mle        the maximum-likelihood control               -> <output-dir>/mle
    python lastmile.py ppo        policy and value against the reward model    -> <output-dir>/ppo/{policy,value}
    python lastmile.py eval       predictions and scores of base, mle, policy  -> <output-dir>/eval
    python lastmile.py tables     the paper's Tables 1 and 2, ours beside the paper's
    python lastmile.py report     curves, tables, outputs token by token       -> <output-dir>/report.html
    python lastmile.py sample     the output for one text
    python lastmile.py predict    outputs for a file of inputs                 -> --output FILE.jsonl
    python lastmile.py merge      base and adapter as one dense model          -> <output-dir>/merge

This file contains the training loops: base, reward model, control, PPO. Every loop processes a batch in the same way:

    load -> encode -> batches -> collate -> llama(tokens, adapter) -> loss -> backward -> update -> log

PPO samples the batch's outputs after `collate`, every second time, and judges them before the loss.

A loop trains one stage; its step function makes one update. What all stages share (settings, folders, resume, log) is
in training/, and so are the last three commands (training/use.py). Read next: data.py, model.py (with lora.py and
quant.py), ppo.py, eval.py.

Paper: Solway 2024, arXiv 2408.16753. Dimensions: B batch, T time.
"""

import gc
import os
import sys

from training import command_line

if __name__ == "__main__":
    command_line.check_early(sys.argv[1:], __doc__)  # answers --help and wrong flags before torch is imported

# torch reads this at its first allocation. Large CPU blocks then come in pages of 2 MB: clearing them in pages of 4 KB
# took up to a third of a step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
import eval as evaluation
import model
import ppo
from beyond import best_of, group, reward_function
from beyond.samples import adapter_hashes, load_with_negatives
from formats.errors import UserError
from speed import shared_prompts
from toy import chatter
from training import ranks, results, use, validation
from training.checkpoint import model_hash
from training.dry_run import calibration_memory, dry_run
from training.files import write_json
from training.folders import command, require, stage_folder
from training.inputs import (
    column_names,
    generator,
    load_column,
    load_examples,
    load_rows,
    new_adapter,
    open_base,
    open_reward,
    start_adapter,
    subsample,
    warn_of_overlap,
    warn_of_short_groups,
)
from training.optimizer import Optimizer
from training.outputs import save_model, save_trained
from training.predictions import continued, depends_on
from training.reward_report import reward_report
from training.run import Run
from training.terminal import progress, say

# ----------------------------------------------------------------------------------------------------------------------
# The base: a small one from scratch, or any Llama to 4 bits


def pretrain(settings):
    """A tiny Llama from scratch, tokenizer included: language modelling on prompts with chat-like answers."""
    s = settings
    dtype = getattr(torch, s.dtype)  # of the matrix products; weights and updates are fp32
    if dtype == torch.float16:
        raise UserError("--dtype float16: gradients vanish without loss scaling; use bfloat16 or float32")
    if s.hidden_size % (2 * s.num_attention_heads) or s.num_attention_heads % s.num_key_value_heads:
        raise UserError(
            f"--hidden-size {s.hidden_size} must be a multiple of twice the {s.num_attention_heads} heads, and these a "
            f"multiple of the {s.num_key_value_heads} key-value heads; change --hidden-size or the numbers of heads"
        )
    with stage_folder(s, "pretrain") as folder:
        tokenizer, rows = pretraining_rows(s, folder)
        config = model.LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=s.hidden_size,
            intermediate_size=s.intermediate_size,
            num_hidden_layers=s.num_hidden_layers,
            num_attention_heads=s.num_attention_heads,
            num_key_value_heads=s.num_key_value_heads,
            head_dim=s.hidden_size // s.num_attention_heads,
            eos_token_id=(tokenizer.eos,),
        )
        llama = model.initialize(config, generator(s, "pretrain"))
        llama.recompute = s.grad_checkpoint
        if s.dry_run:
            return dry_run(s, llama.to("meta"), rows, ["base"])
        llama.to(s.device)
        optimizer = Optimizer(list(llama.parameters()), max_grad_norm=s.max_grad_norm)
        with Run(folder, "pretrain", s, rows, optimizer, bar=["loss"]) as run:
            for step, rate, batch in run.batches(s.warmup_steps):
                tokens = batch.mask.sum().item()
                numbers = mle_step(llama, batch, optimizer, rate, tokens, s.micro_batch_size, None, dtype)
                run.log(step, batch, learning_rate=rate, **numbers)
        model.save(llama, folder)


def pretraining_rows(settings, folder):
    """(tokenizer, rows): a tokenizer trained on the texts, and the texts as rows whose only prompt is BOS."""
    s = settings
    examples = load_examples(s, "pretrain" if s.data == "toy" else "train")
    examples = [example for example in examples if example.label]
    if s.data != "toy" and s.chatter:
        examples = [replace(e, target=chatter(e.source)) for e in examples]
    template = data.load_template(s.template, folder, ())[0] if s.template else data.SHORT_TEMPLATE
    (folder / "template.txt").write_text(template, encoding="utf-8")
    texts = [template.replace("{source}", example.source) + " " + example.target for example in examples]
    tokenizer = data.train_tokenizer(texts, s.vocab_size, folder)
    rows, _ = data.encode(examples, tokenizer, s.max_input_tokens, s.max_new_tokens)
    say(f"pretrain: {len(rows)} of {len(examples)} examples are short enough")
    rows = subsample(s, "pretrain", rows, s.train_examples)
    return tokenizer, [replace(row, prompt=row.prompt[:1], response=row.prompt[1:] + row.response) for row in rows]


def quantize(settings):
    """A dense Llama folder to a 4-bit one. Reads --model, by default <output-dir>/pretrain."""
    group_size = settings.group_size
    if group_size != -1 and (group_size < 8 or group_size % 8):
        raise UserError(f"--group-size {group_size}: must be -1 (one scale a column) or a multiple of 8")
    with stage_folder(settings, "base") as folder:
        llama, tokenizer = open_base(settings)
        if llama.config.quantization:
            raise UserError(f"{settings.model}: already quantized; name an fp16 or fp32 model: --model FOLDER")
        rows = load_rows(settings, "train", llama, tokenizer, settings.calibration_examples)
        if settings.dry_run:
            return dry_run(settings, llama, rows, extra=calibration_memory(llama, rows))
        warn_of_short_groups(settings, llama.config)
        calibration = [row.prompt + row.response for row in rows]
        bar = progress("quantize", "block")
        config = model.quantize(
            llama, calibration, group_size, settings.act_order, settings.damp, bar,
            settings.scale_search, settings.true_sequential,
        )  # fmt: skip
        save_model(settings, llama, tokenizer, folder, config)


# ----------------------------------------------------------------------------------------------------------------------
# The reward model (paper, 3.2)


def train_reward(settings):
    """The reward model: score 1 for every token of the truth, 0 for every token of a negative (paper, 3.2)."""
    columns = column_names("--samples", settings.samples) if settings.samples else []
    if settings.level == "sequence" and settings.head == "likelihood":
        raise UserError("--level sequence reads one score, and --head likelihood scores single tokens; choose one")
    if settings.level == "sequence" and settings.hallucinations == "span":
        raise UserError("--level sequence scores no single tokens; use --hallucinations sequence")
    with stage_folder(settings, "reward") as folder:
        llama, tokenizer = open_base(settings)
        rows, heldout = load_with_negatives(settings, llama, tokenizer, columns)
        head = "normal" if settings.head == "scalar" else None
        depends_on = start_adapter(settings, llama, "reward", stream="lora", head=head)
        if settings.dry_run:
            return dry_run(settings, llama, rows, ["reward"], has_logits=head is None)
        optimizer = Optimizer(llama.adapter_parameters("reward"), max_grad_norm=settings.max_grad_norm)
        weight_per_batch = average_batch(settings, [row.weight for row in rows])
        depends_on |= adapter_hashes(settings, columns)
        bar = ["loss", "positive", "negative"]
        validate = validation.of_reward(settings, llama, heldout)
        with Run(folder, "reward", settings, rows, optimizer, llama.folder, depends_on, bar, validate) as run:
            for step, rate, batch in run.batches():
                numbers = reward_step(
                    llama, batch, optimizer, rate, weight_per_batch, settings.level, settings.micro_batch_size,
                    settings.share_prompts,
                )  # fmt: skip
                run.log(step, batch, learning_rate=rate, **numbers)
        write_json(folder / "heldout.json", reward_report(settings, llama, heldout))
        save_trained(settings, llama, tokenizer, "reward", folder)


def reward_step(llama, batch, optimizer, rate, weight_per_batch, level="token", micro_batch_size=0, shared=False):
    """One update of the reward model. Returns its metrics.

    weight_per_batch: the sum of the rows' weights in an average batch, see `average_batch`. shared: lay out a prompt
    once for all of its rows, see speed/shared_prompts.py.
    """
    scores = []
    for part in ranks.share(batch).split(micro_batch_size):
        layout = shared_prompts.lay_out(part) if shared else None
        score = ppo.token_scores(llama, part, layout)  # (B, T)
        loss = ppo.reward_loss(score, part, level)
        optimizer.backward(loss, part.weight.sum().item() / weight_per_batch)
        scores.append(score.detach())
    grad_norm = optimizer.step(rate)
    score = ranks.whole(torch.cat(scores), len(batch.rows))  # (B, T)
    scored = ppo.scored_tokens(batch.mask, level) & batch.judged  # (B, T)
    good = batch.label[:, None] == 1  # (B, 1)
    return {
        "loss": ppo.reward_loss(score, batch, level).item(),
        "grad_norm": grad_norm,
        "positive": mean_or_none(score, scored & good),
        "negative": mean_or_none(score, scored & ~good),
    }


def average_batch(settings, amounts):
    """How much of something (tokens, weights) an average batch contains; amounts: how much each row contains.

    The losses of reward and mle are divided by this and not by what their own batch contains. Rows of similar length
    share a batch: divided by its own tokens, a batch of long rows would weigh each of them less than in a plain
    shuffle. PPO averages over its own batch, as equation 3 says; how long its samples are is not known beforehand.
    """
    rows = min(settings.batch_size, len(amounts))  # few data make one small batch
    return rows * sum(amounts) / len(amounts)


def mean_or_none(x, mask):
    """Mean of x (B, T) over a mask, None where the mask is empty."""
    return ppo.masked_mean(x, mask).item() if mask.any() else None


# ----------------------------------------------------------------------------------------------------------------------
# The control (paper, 3.4)


def train_mle(settings):
    """The control: maximum likelihood of the true outputs (paper, 3.4)."""
    with stage_folder(settings, "mle") as folder:
        llama, tokenizer = open_base(settings)
        rows = load_rows(settings, "train", llama, tokenizer, settings.train_examples, settings.eos_in_labels)
        depends_on = start_adapter(settings, llama, "mle", stream="lora")
        if settings.dry_run:
            return dry_run(settings, llama, rows, ["mle"])
        optimizer = Optimizer(llama.adapter_parameters("mle"), max_grad_norm=settings.max_grad_norm)
        tokens_per_batch = average_batch(settings, [len(row.response) for row in rows])
        validate = validation.of_mle(settings, llama, tokenizer)
        with Run(folder, "mle", settings, rows, optimizer, llama.folder, depends_on, ["loss"], validate) as run:
            for step, rate, batch in run.batches():
                numbers = mle_step(llama, batch, optimizer, rate, tokens_per_batch, settings.micro_batch_size)
                run.log(step, batch, learning_rate=rate, **numbers)
        save_trained(settings, llama, tokenizer, "mle", folder)


def mle_step(llama, batch, optimizer, rate, tokens_per_batch, micro_batch_size=0, adapter="mle", dtype=torch.float32):
    """One update of the control; adapter None: of the base itself, in `pretrain`. Returns its metrics.

    tokens_per_batch: the response tokens of an average batch, see `average_batch`. dtype: of the products, where the
    weights are fp32.
    """
    logps = []
    for part in ranks.share(batch).split(micro_batch_size):
        with torch.autocast(llama.device.type, dtype, enabled=dtype != torch.float32):
            logp = ppo.response_logp(llama, part, adapter)  # (B, T)
        loss = ppo.mle_loss(logp, part.mask)
        optimizer.backward(loss, part.mask.sum().item() / tokens_per_batch)
        logps.append(logp.detach())
    grad_norm = optimizer.step(rate)
    logp = ranks.whole(torch.cat(logps), len(batch.rows))  # (B, T)
    return {"loss": ppo.mle_loss(logp, batch.mask).item(), "grad_norm": grad_norm}


# ----------------------------------------------------------------------------------------------------------------------
# PPO (paper, 3.3)


def train_ppo(settings):
    """Policy and value against the reward model; half of the batches sampled, half ground truth (paper, 3.3)."""
    if settings.whiten and settings.micro_batch_size:
        raise UserError("--whiten needs the advantages of the whole batch at once; remove --micro-batch-size")
    with stage_folder(settings, "ppo") as folder:
        train_missing_reward(settings)
        llama, tokenizer = open_base(settings)
        rows = load_rows(settings, "train", llama, tokenizer, settings.train_examples)
        scorer, depends_on = open_reward(settings, llama, tokenizer, rows)
        depends_on |= add_actors(settings, llama)
        if settings.dry_run:
            return dry_run(settings, llama, rows, ["policy", "value"], samples=True)
        policy, value = llama.adapter_parameters("policy"), llama.adapter_parameters("value")
        optimizer = Optimizer(policy, value, max_grad_norm=settings.max_grad_norm)
        bar = ["return", "reward", "length", "explained_variance"]
        validate = validation.of_ppo(settings, llama, tokenizer, scorer)
        with Run(folder, "ppo", settings, rows, optimizer, llama.folder, depends_on, bar, validate) as run:
            for step, rate, batch in run.batches():
                # 1. Act: sample from the policy, or take the ground truth as the policy's own actions
                truth = ppo.is_ground_truth(step, settings.ground_truth_fraction)
                if not truth:
                    limit = settings.max_new_tokens
                    uniform = torch.rand(len(batch.rows), limit, generator=generator(settings, "rollout", step))
                    sampler = partial(model.sample, llama, adapter="policy", max_new_tokens=limit, with_logp=True)
                    batch = ppo.rollout(batch, ranks.sharded(sampler, uniform.to(settings.device)))
                # 2. Judge and learn
                log_kl = step % settings.log_every == 0
                policy_learns = step >= settings.value_warmup_steps
                if step == settings.value_warmup_steps:
                    optimizer.start_again(policy)  # its gradients were zero until here
                numbers = ppo_step(llama, batch, optimizer, rate, scorer, settings, log_kl, policy_learns)
                run.log(step, batch, ground_truth=truth, learning_rate=rate, **numbers)
        save_trained(settings, llama, tokenizer, "policy", folder / "policy")
        save_trained(settings, llama, tokenizer, "value", folder / "value")


def ppo_step(llama, batch, optimizer, rate, scorer, settings, log_kl=False, policy_learns=True):
    """The update on one batch (paper, 3.3), or --ppo-epochs of them. Returns the metrics of the last.

    scorer: Batch -> (B, T), the reward of every response token, see training.inputs.open_reward. policy_learns: False
    while the value alone does, see --value-warmup-steps.
    """
    parts = ranks.share(batch).split(settings.micro_batch_size)
    trajectories, first_logp = [], []  # one for each micro-batch
    for epoch in range(settings.ppo_epochs):
        passes = []
        for i, part in enumerate(parts):
            logp, value, entropy = ppo.actor_critic(llama, part, settings.entropy_coef > 0)  # (B, T) each
            if epoch == 0:
                trajectories.append(judge(llama, part, logp, value, scorer, settings, log_kl))
                first_logp.append(logp.detach())
            policy_loss = ppo.policy_loss(logp, trajectories[i], settings.clip_range)  # equation 3
            value_loss = ppo.value_loss(value, trajectories[i], settings.value_clip)  # to the target of equation 4
            if settings.entropy_coef > 0:
                policy_loss = policy_loss - settings.entropy_coef * ppo.masked_mean(entropy, part.mask)
            loss = value_loss + policy_learns * policy_loss  # no coefficient: disjoint adapters, each with its own clip
            optimizer.backward(loss, data.fraction(part.mask, batch.mask))
            passes.append((logp.detach(), value.detach(), entropy.detach()))
        grad_norm = optimizer.step(rate)
    whole = partial(ranks.whole, rows=len(batch.rows))
    traj = ppo.Trajectory.cat(trajectories, whole)
    logp, value, entropy = [whole(torch.cat(parts)) for parts in zip(*passes, strict=True)]
    numbers = ppo.statistics(traj, batch, logp, value, entropy, settings.clip_range, llama.config.eos_token_id)
    if batch.logp is not None:
        numbers["sampler_mismatch"] = ppo.masked_mean(
            (whole(torch.cat(first_logp)) - batch.logp).abs(), batch.mask
        ).item()
    numbers["policy_loss"] = ppo.policy_loss(logp, traj, settings.clip_range).item()
    numbers["value_loss"] = ppo.value_loss(value, traj, settings.value_clip).item()
    return numbers | {"grad_norm": grad_norm}  # the policy's


@torch.no_grad()
def judge(llama, batch, logp, value, scorer, settings, log_kl=False):
    """Score a batch, and compare it with the base where the KL is wanted; then its trajectory, see ppo.trajectory."""
    s = settings
    kl = None
    if s.kl_coef or log_kl:  # the base is the policy without its adapter: no second model
        kl = logp - ppo.response_logp(llama, batch, adapter=None)  # (B, T)
    reward = ppo.token_rewards(batch, scorer(batch), s.length_penalty, s.reward_clamp, kl, s.kl_coef)  # (B, T)
    return ppo.trajectory(batch, logp, value, reward, s.gamma, s.lam, kl, s.whiten, ranks.total)


def add_actors(settings, llama):
    """Add the policy, new or from --init, and a new value. Returns {name: hash} of the adapter that --init names."""
    depends_on = start_adapter(settings, llama, "policy", stream="policy")
    new_adapter(settings, llama, "value", stream="value", head="zero")
    return depends_on


def train_missing_reward(settings):
    """Train the reward model that PPO needs, with that stage's own settings, where there is none yet."""
    if reward_function.is_function(settings.reward) or Path(settings.reward).exists():
        return
    if Path(settings.reward) != Path(settings.output_dir) / "reward":
        line = command("reward", settings)
        raise FileNotFoundError(f"{settings.reward}: no such folder; run: python lastmile.py {line}, and omit --reward")
    if settings.dry_run:
        return
    llama, _ = open_base(replace(settings, dry_run=True))
    llama.hash = model_hash(llama.folder)
    add_actors(settings, llama)  # what PPO would refuse later, it refuses now
    say(f"ppo: no reward model in {settings.reward} yet; training it first")
    train_reward(command_line.reward_settings(settings))
    gc.collect()  # the layers of its base refer to each other: or there would be two bases in memory


def judge_reward(settings):
    """Best of N by the reward model, beside greedy answers, one sample and the oracle, on validation examples."""
    llama, tokenizer = open_base(settings)
    adapter = load_column(settings, llama, settings.adapter)
    rows = load_rows(settings, settings.split, llama, tokenizer, settings.eval_examples)
    score, _ = open_reward(settings, llama, tokenizer, rows)
    if settings.dry_run:
        return dry_run(settings, llama, rows, samples=True)
    found = best_of.best_of(settings, llama, tokenizer, rows, score, adapter, settings.best_of)
    best_of.show(settings, found)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (paper, 4)


def evaluate(settings):
    """Greedy predictions on the test split and their scores, for base, mle and policy, raw and cleaned."""
    names = column_names("--adapters", settings.adapters)
    evaluation.metrics_by_example([], [], "ascii")  # without rouge-score it ends here, not after the predictions
    with stage_folder(settings, "eval") as folder:
        llama, tokenizer = open_base(settings)
        adapters = {name: load_column(settings, llama, name) for name in names}
        rows = load_rows(settings, "test", llama, tokenizer, settings.test_examples)
        if settings.dry_run:
            return dry_run(settings, llama, rows, samples=True)
        warn_of_overlap(settings, rows)
        greedy = partial(model.sample, llama, max_new_tokens=settings.max_new_tokens, temperature=0)
        predictions = {}
        inputs = [(row.id, row.source) for row in rows]
        for name, adapter in adapters.items():
            facts = depends_on(settings, inputs, llama, tokenizer, name)
            sampler = ranks.sharded(partial(greedy, adapter=adapter))
            sampler = continued(sampler, folder / "checkpoints" / f"{name}.jsonl", facts)
            bar = progress(f"eval {name}")
            predictions[name] = evaluation.predict(rows, sampler, settings.batch_size, tokenizer.decode, bar)
            results.write_predictions(folder / f"{name}.jsonl", rows, predictions[name])
        ranks.first_alone(partial(results.score, settings, folder, rows, predictions))
    say(f"\n{rows[0].source}\n\nreference: {rows[0].target}")
    for name in names:
        say(f"{name}: {predictions[name][0]}")


def show_tables(settings):
    """Print the paper's Tables 1 and 2, ours beside the paper's, and write them to eval/tables.md."""
    folder = Path(settings.output_dir) / "eval"
    require(folder, "eval", settings)
    _, text = results.read_scores(folder, settings.beside)
    say(text)
    if settings.dry_run:
        return
    (folder / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    say(f"\nAll results are in {Path(settings.output_dir).resolve()}; these tables in {folder / 'tables.md'}")


def write_report(settings, runs=()):
    """One HTML page of everything in the run's folder, or of several runs side by side."""
    from report import side_by_side  # here: the other commands need no template engine
    from report.write import write

    side_by_side.write(runs) if runs else write(settings)


COMMANDS = {
    "pretrain": pretrain,
    "quantize": quantize,
    "reward": train_reward,
    "mle": train_mle,
    "ppo": train_ppo,
    "judge": judge_reward,
    "group": group.train_group,
    "eval": evaluate,
    "tables": show_tables,
    "report": write_report,
    "merge": use.merge,
    "sample": use.answer,
    "predict": use.predict,
}


def main(arguments=None):
    """Run one command. arguments: those of the command line by default. Returns the exit code."""
    return command_line.main(COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
