"""lastmile: fine-tune a chat model on your own input-output pairs by reinforcement learning, without human feedback.

    python lastmile.py pretrain   a tiny Llama from scratch                    -> <output-dir>/pretrain
    python lastmile.py quantize   a dense Llama to 4 bits, by GPTQ             -> <output-dir>/base
    python lastmile.py reward     a token-level reward model                   -> <output-dir>/reward
    python lastmile.py mle        the maximum-likelihood control               -> <output-dir>/mle
    python lastmile.py ppo        policy and value against the reward model    -> <output-dir>/ppo/{policy,value}
    python lastmile.py judge      whether the reward model's picks beat greedy answers
    python lastmile.py eval       predictions and scores of base, mle, policy  -> <output-dir>/eval
    python lastmile.py tables     the paper's Tables 1 and 2, ours beside the paper's
    python lastmile.py report     curves, tables, outputs token by token       -> <output-dir>/report.html
    python lastmile.py sample     the output for one text
    python lastmile.py predict    outputs for a file of inputs                 -> --output FILE.jsonl
    python lastmile.py merge      base and adapter as one dense model          -> <output-dir>/merge

This file contains everything that turns a loss into a change of weights: the loop that all stages share (`train`), the
learning rate, AdamW with its clip, and of each stage what is its own. A batch goes one way:

    load -> encode -> epochs -> collate -> act -> llama(tokens, adapter) -> loss -> backward -> update -> log

Only PPO acts: it samples the outputs of every second batch. Read next: data.py, model.py (with lora.py and quant.py),
ppo.py, eval.py. What protects a run is in safety/, what talks to the user in interface/.

Paper: Solway 2024, arXiv 2408.16753. AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. Dimensions: B batch, T time.
"""

import gc
import itertools
import math
import os
import sys

from interface import command_line

if __name__ == "__main__":
    command_line.check_early(sys.argv[1:], __doc__)  # answers --help and wrong flags before torch is imported

# torch reads this at its first allocation. Large CPU blocks then come in pages of 2 MB: clearing them in pages of 4 KB
# took up to a third of a step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

import data
import eval as evaluation
import model
import ppo
from beyond import best_of, reward_function
from beyond.samples import add_negatives, check_missing
from formats.errors import UserError
from interface import results, use
from interface.folders import command, stage_folder
from interface.inputs import (
    adapter_hashes,
    adapter_names,
    load_examples,
    load_named,
    load_rows,
    new_adapter,
    open_base,
    open_reward,
    start_adapter,
    subsample,
    validation_rows,
    warn_of_short_groups,
    warn_of_test_rows,
)
from interface.outputs import save_model, save_trained
from interface.plan import end_dry_run, warn_of_little_training
from interface.predictions import continued, facts_of_outputs, keeper
from interface.trained_on import warn_of_other_data
from quant import Recipe
from safety import ranks, validation
from safety.files import write_json
from safety.run import Run
from safety.terminal import progress, say
from speed import shared_prompts
from toy import chatter

# ----------------------------------------------------------------------------------------------------------------------
# The loop that all stages share


def number_of_steps(settings, rows):
    """How many steps a run takes: all epochs, or --max-steps."""
    return settings.max_steps or settings.epochs * math.ceil(len(rows) / settings.batch_size)


def learning_rate(step, steps, peak, warmup_steps=0):
    """Linear warm-up to the peak, times a cosine from 1 to 0 over all steps (paper, 3.1)."""
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class Optimizer:
    """AdamW over one or more groups of fp32 parameters, each group with its own gradient clip.

    optimizer.backward(loss, share)   once for each micro-batch
    optimizer.step(learning_rate)     once for each batch
    Weight decay 0, and a clip for each adapter: our choices where the paper is silent.
    """

    def __init__(self, *groups, max_grad_norm):
        """groups: lists of parameters, for example those of the policy and those of the value adapter."""
        self.groups = groups
        self.parameters = list(itertools.chain(*groups))
        self.max_grad_norm = max_grad_norm
        self.loss = 0.0  # of the batch, summed over its micro-batches
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.adamw = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)

    def backward(self, loss, share=1.0):
        """Add the gradients of one micro-batch. share: of its loss in that of the whole batch."""
        (loss * share).backward()
        self.loss += loss.item() * share

    def step(self, learning_rate):
        """One update, by the gradients of all ranks. Returns the gradient norm of the first group before clipping.

        Raises FloatingPointError, and makes no update, if the loss or a norm is not finite.
        """
        loss, self.loss = ranks.sum_gradients(self.parameters, self.loss), 0.0
        norms = [torch.nn.utils.clip_grad_norm_(group, self.max_grad_norm).item() for group in self.groups]
        if not all(math.isfinite(number) for number in (loss, *norms)):
            raise FloatingPointError(f"loss {loss}, gradient norms {norms}: not finite, no update made")
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norms[0]

    def start_again(self, group):
        """Forget a group's moments and how many updates it had, as if its next were its first."""
        for parameter in group:
            self.adamw.state.pop(parameter, None)


def unchanged(step, batch):
    return batch


def train(stage, settings, folder, llama, rows, optimizer, update, act=unchanged, **protection):
    """The loop of every stage: a batch, an update and a line of the log, for all epochs or --max-steps.

    rows: list of Datum. update: (step, Batch, learning rate) -> {metric: number}, which changes the weights.
    act: (step, Batch) -> Batch, which replaces the batch's responses. protection: what else safety.run.Run wants to
    know: on what the result depends, how to validate it, which metrics the progress bar shows.
    """
    s = settings
    steps = number_of_steps(s, rows)
    order = data.epochs(rows, s.batch_size, s.seed, rows_per_prompt(s))

    def one_update():
        """What --dry-run measures: on the largest batch, at a rate of 0."""
        batch = data.collate([rows[i] for i in largest_batch(s, rows)], s.device)
        update(0, act(0, batch), 0.0)

    end_dry_run(s, llama, rows, steps, optimizer.parameters, one_update)
    llama.prepared = None  # the sampler's copy of the weights: the updates need its memory
    with Run(folder, stage, s, rows, optimizer, steps, llama.folder, **protection) as run:
        warn_of_little_training(s, steps)
        for step, index in enumerate(itertools.islice(order, run.first, steps), run.first):
            batch = data.collate([rows[i] for i in index], s.device)
            run.begin_step(step, batch)
            batch = act(step, batch)
            rate = learning_rate(step, steps, s.learning_rate, getattr(s, "warmup_steps", 0))
            numbers = update(step, batch, rate)
            run.log(step, batch, learning_rate=rate, **numbers)
            run.end_step()


def largest_batch(settings, rows):
    """The row numbers of the batch of an epoch that has the most tokens, padding included."""
    order = data.epochs(rows, settings.batch_size, settings.seed, rows_per_prompt(settings))
    epoch = itertools.islice(order, math.ceil(len(rows) / settings.batch_size))

    def tokens(index):
        return len(index) * max(len(rows[i].prompt) + len(rows[i].response) for i in index)

    return max(epoch, key=tokens)


def rows_per_prompt(settings):
    """How many rows of one prompt share a batch (see data.epochs): in the reward stage alone do several have one."""
    return settings.rows_per_prompt if getattr(settings, "share_prompts", False) else 1


def average_batch(settings, amounts):
    """How much of something (tokens, weights) an average batch contains; amounts: how much each row contains.

    The losses of reward and mle are divided by this and not by what their own batch contains. Rows of similar length
    share a batch: divided by its own tokens, a batch of long rows would weigh each of them less than in a plain
    shuffle. PPO averages over its own batch, as equation 3 says; how long its samples are is not known beforehand.
    """
    rows = min(settings.batch_size, len(amounts))  # few data make one small batch
    return rows * sum(amounts) / len(amounts)


# ----------------------------------------------------------------------------------------------------------------------
# The base: a small one from scratch, or any Llama to 4 bits


def pretrain(settings):
    """A tiny Llama from scratch, tokenizer included: language modelling on prompts with chat-like answers."""
    s = settings
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
        llama = model.initialize(config, data.generator(s.seed, "pretrain"))
        llama.recompute = s.grad_checkpoint
        llama.to(s.device)
        optimizer = Optimizer(list(llama.parameters()), max_grad_norm=s.max_grad_norm)

        def update(step, batch, rate):
            tokens = batch.mask.sum().item()
            return mle_step(llama, batch, optimizer, rate, tokens, s.micro_batch_size, None, getattr(torch, s.dtype))

        train("pretrain", s, folder, llama, rows, optimizer, update)
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
        end_dry_run(settings, llama, rows)
        warn_of_short_groups(settings, llama.config)
        calibration = [row.prompt + row.response for row in rows]
        recipe = Recipe(*[getattr(settings, field.name) for field in fields(Recipe)])
        config = model.quantize(llama, calibration, recipe, progress("quantize", "block"))
        save_model(settings, llama, tokenizer, folder, config)


# ----------------------------------------------------------------------------------------------------------------------
# The reward model (paper, 3.2)


def train_reward(settings):
    """The reward model: score 1 for every token of the truth, 0 for every token of a negative (paper, 3.2)."""
    names = adapter_names("--samples", settings.samples) if settings.samples else []
    if settings.level == "sequence" and settings.head == "likelihood":
        raise UserError("--level sequence reads one score, and --head likelihood scores single tokens; choose one")
    if settings.level == "sequence" and settings.hallucinations == "span":
        raise UserError("--level sequence scores no single tokens; use --hallucinations sequence")
    with stage_folder(settings, "reward") as folder:
        llama, tokenizer = open_base(settings)
        rows, heldout = rows_with_negatives(settings, llama, tokenizer, names, folder)
        head = "normal" if settings.head == "scalar" else None
        depends_on = start_adapter(settings, llama, "reward", "lora", rows, head)
        optimizer = Optimizer(llama.adapter_parameters("reward"), max_grad_norm=settings.max_grad_norm)
        weight_per_batch = average_batch(settings, [row.weight for row in rows])

        def update(step, batch, rate):
            return reward_step(
                llama, batch, optimizer, rate, weight_per_batch, settings.level, settings.micro_batch_size,
                settings.share_prompts,
            )  # fmt: skip

        train(
            "reward", settings, folder, llama, rows, optimizer, update,
            depends_on=depends_on | adapter_hashes(settings, names), bar=["loss", "positive", "negative"],
            validate=validation.of_reward(settings, llama, heldout),
        )  # fmt: skip
        write_json(folder / "heldout.json", validation.reward_report(settings, llama, heldout))
        if settings.best_of:
            compare_picks(settings, llama, tokenizer, heldout)
        save_trained(settings, llama, tokenizer, rows, "reward", folder)


def rows_with_negatives(settings, llama, tokenizer, names, folder):
    """(rows to train on, of all rounds; held-out rows), each true output followed by its negatives.

    names: of base, mle and policy those whose samples are negatives, too. folder: where these are kept for --resume.
    """
    labelled = load_rows(settings, "train", llama, tokenizer, settings.train_examples, rejected=True)
    heldout = load_rows(settings, "validation", llama, tokenizer, settings.eval_examples, rejected=True)
    samplers = {name: load_named(settings, llama, name) for name in names}
    add = partial(add_negatives, settings, llama, tokenizer, samplers, keeper(settings, folder, llama, tokenizer))
    rows = []
    for round in range(settings.rounds):
        rows += add(labelled, "train", round)
    heldout = add(heldout, "validation")
    check_missing(settings, rows, names)
    return rows, heldout


def compare_picks(settings, llama, tokenizer, heldout):
    """Print whether the reward model's best of N outputs of MLE, or else of the base, beats greedy answers."""
    mle = Path(settings.output_dir) / "mle"
    adapter = load_named(settings, llama, "mle" if mle.exists() else "base")
    score = partial(ppo.reward_scores, llama, level=settings.level)
    rows = [row for row in heldout if row.kind == "positive"]
    best_of.show(settings, best_of.compare(settings, llama, tokenizer, rows, score, adapter, settings.best_of))


def reward_step(llama, batch, optimizer, rate, weight_per_batch, level="token", micro_batch_size=0, shared=False):
    """One update of the reward model. Returns its metrics.

    weight_per_batch: the sum of the rows' weights in an average batch, see `average_batch`. shared: lay out a prompt
    once for all of its rows, see speed/shared_prompts.py.
    """
    scores = []
    mine, counts = ranks.share(batch)
    for part in mine.split(micro_batch_size):
        layout = shared_prompts.lay_out(part) if shared else None
        score = ppo.token_scores(llama, part, layout)  # (B, T)
        loss = ppo.reward_loss(score, part, level)
        optimizer.backward(loss, counts * part.weight.sum().item() / weight_per_batch)
        scores.append(score.detach())
    grad_norm = optimizer.step(rate)
    score = ranks.whole(torch.cat(scores), len(batch.rows))  # (B, T)
    scored = ppo.learned_tokens(batch, level)  # (B, T)
    good = batch.label[:, None] == 1  # (B, 1)
    return {
        "loss": ppo.reward_loss(score, batch, level).item(),
        "grad_norm": grad_norm,
        "positive": mean_or_none(score, scored & good),
        "negative": mean_or_none(score, scored & ~good),
    }


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
        heldout = validation_rows(settings, llama, tokenizer, settings.eos_in_labels)
        depends_on = start_adapter(settings, llama, "mle", "lora", rows)
        if settings.best_of:
            score, facts = open_reward(settings, llama, tokenizer, rows)
            warn_of_other_data(settings.reward, rows)
            sample = partial(best_of.sampled, settings, llama, rows, "mle", settings.best_of)
            keep = keeper(settings, folder, llama, tokenizer)
            rows = rows + best_of.picked(settings, rows, score, keep(settings.init, rows, "best_of", sample))
            depends_on |= facts
        optimizer = Optimizer(llama.adapter_parameters("mle"), max_grad_norm=settings.max_grad_norm)
        tokens_per_batch = average_batch(settings, [len(row.response) for row in rows])

        def update(step, batch, rate):
            return mle_step(llama, batch, optimizer, rate, tokens_per_batch, settings.micro_batch_size)

        train(
            "mle", settings, folder, llama, rows, optimizer, update, depends_on=depends_on,
            validate=validation.of_mle(settings, llama, heldout),
        )  # fmt: skip
        save_trained(settings, llama, tokenizer, rows, "mle", folder)


def mle_step(llama, batch, optimizer, rate, tokens_per_batch, micro_batch_size=0, adapter="mle", dtype=torch.float32):
    """One update of the control; adapter None: of the base itself, in `pretrain`. Returns its metrics.

    tokens_per_batch: the response tokens of an average batch, see `average_batch`. dtype: of the products, where the
    weights are fp32.
    """
    logps = []
    mine, counts = ranks.share(batch)
    for part in mine.split(micro_batch_size):
        with torch.autocast(llama.device.type, dtype, enabled=dtype != torch.float32):
            logp = ppo.response_logp(llama, part, adapter)  # (B, T)
        loss = ppo.mle_loss(logp, part.mask)
        optimizer.backward(loss, counts * part.mask.sum().item() / tokens_per_batch)
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
        heldout = validation_rows(settings, llama, tokenizer)
        scorer, depends_on = open_reward(settings, llama, tokenizer, rows)
        warn_of_other_data(settings.reward, rows)
        depends_on |= add_actors(settings, llama, rows)
        policy, value = llama.adapter_parameters("policy"), llama.adapter_parameters("value")
        optimizer = Optimizer(policy, value, max_grad_norm=settings.max_grad_norm)

        def act(step, batch):
            """Sample from the policy, or take the ground truth as the policy's own actions."""
            if ppo.is_ground_truth(step, settings.ground_truth_fraction):
                return batch
            limit = settings.max_new_tokens
            uniform = torch.rand(len(batch.rows), limit, generator=data.generator(settings.seed, "rollout", step))
            sampler = partial(model.sample, llama, adapter="policy", max_new_tokens=limit, with_logp=True)
            return ppo.rollout(batch, ranks.sharded(sampler, uniform.to(settings.device)))

        def update(step, batch, rate):
            """Judge the batch and learn from it; policy and value in one pass."""
            if step == settings.value_warmup_steps:
                optimizer.start_again(policy)  # its gradients were zero until here
            log_kl, policy_learns = step % settings.log_every == 0, step >= settings.value_warmup_steps
            numbers = ppo_step(llama, batch, optimizer, rate, scorer, settings, log_kl, policy_learns)
            return {"ground_truth": batch.logp is None} | numbers

        train(
            "ppo", settings, folder, llama, rows, optimizer, update, act, depends_on=depends_on,
            bar=["return", "reward", "length", "explained_variance"],
            validate=validation.of_ppo(settings, llama, tokenizer, scorer, heldout),
        )  # fmt: skip
        save_trained(settings, llama, tokenizer, rows, "policy", folder / "policy")
        save_trained(settings, llama, tokenizer, rows, "value", folder / "value")


def ppo_step(llama, batch, optimizer, rate, scorer, settings, log_kl=False, policy_learns=True):
    """The update on one batch (paper, 3.3), or --ppo-epochs of them. Returns the metrics of the last.

    scorer: Batch -> (B, T), the reward of every response token, see interface.inputs.open_reward. policy_learns: False
    while the value alone does, see --value-warmup-steps.
    """
    mine, counts = ranks.share(batch)
    parts = mine.split(settings.micro_batch_size)
    trajectories, first_logp = [], []  # one for each micro-batch
    for epoch in range(settings.ppo_epochs):
        passes = []
        for i, part in enumerate(parts):
            logp, value, entropy = ppo.actor_critic(llama, part, settings.entropy_coef > 0)  # (B, T) each
            if epoch == 0:
                trajectories.append(trajectory_of(llama, part, logp, value, scorer, settings, log_kl, counts))
                first_logp.append(logp.detach())
            policy_loss = ppo.policy_loss(logp, trajectories[i], settings.clip_range)  # equation 3
            value_loss = ppo.value_loss(value, trajectories[i], settings.value_clip)  # to the target of equation 4
            if settings.entropy_coef > 0:
                policy_loss = policy_loss - settings.entropy_coef * ppo.masked_mean(entropy, part.mask)
            loss = value_loss + policy_learns * policy_loss  # no coefficient: disjoint adapters, each with its own clip
            optimizer.backward(loss, counts * data.fraction(part.mask, batch.mask))
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
def trajectory_of(llama, batch, logp, value, scorer, settings, log_kl=False, counts=1):
    """The trajectory of a batch, scored, and compared with the base if the KL is wanted; see ppo.trajectory."""
    s = settings
    kl = None
    if s.kl_coef or log_kl:  # the base is the policy without its adapter: no second model
        kl = logp - ppo.response_logp(llama, batch, adapter=None)  # (B, T)
    reward = ppo.token_rewards(batch, scorer(batch), s.length_penalty, s.reward_clamp, kl, s.kl_coef)  # (B, T)
    total = partial(ranks.total, counts=counts)
    return ppo.trajectory(batch, logp, value, reward, s.gamma, s.lam, kl, s.whiten, total)


def add_actors(settings, llama, rows=()):
    """Add the policy, new or from --init, and a new value. Returns {name: hash} of the adapter that --init names."""
    depends_on = start_adapter(settings, llama, "policy", "policy", rows)
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
    add_actors(settings, open_base(settings)[0])  # what PPO would refuse later, it refuses now
    say(f"ppo: no reward model in {settings.reward} yet; training it first")
    train_reward(command_line.reward_settings(settings))
    gc.collect()  # the layers of its base refer to each other: or there would be two bases in memory


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (paper, 4)


def evaluate(settings):
    """Greedy predictions on the test split and their scores, for base, mle and policy, raw and cleaned."""
    names = adapter_names("--adapters", settings.adapters)
    evaluation.metrics_by_example([], [], "ascii")  # without rouge-score it ends here, not after the predictions
    with stage_folder(settings, "eval") as folder:
        llama, tokenizer = open_base(settings)
        adapters = {name: load_named(settings, llama, name) for name in names}
        rows = load_rows(settings, "test", llama, tokenizer, settings.test_examples)
        end_dry_run(settings, llama, rows)
        warn_of_test_rows(settings, names, rows)
        greedy = partial(model.sample, llama, max_new_tokens=settings.max_new_tokens, temperature=0)
        predictions = {}
        inputs = [(row.id, row.source) for row in rows]
        for name, adapter in adapters.items():
            facts = facts_of_outputs(settings, inputs, llama, tokenizer, name)
            sampler = ranks.sharded(partial(greedy, adapter=adapter))
            sampler = continued(sampler, folder / "checkpoints" / f"{name}.jsonl", facts)
            bar = progress(f"eval {name}")
            predictions[name] = evaluation.predict(rows, sampler, settings.batch_size, tokenizer.decode, bar)
            results.write_predictions(folder / f"{name}.jsonl", rows, predictions[name])
        ranks.first_alone(partial(results.score, settings, folder, rows, predictions))
    say(f"\n{rows[0].source}\n\nreference: {rows[0].target}")
    for name in names:
        say(f"{name}: {predictions[name][0]}")


def write_report(settings):
    """One HTML page of everything in the run's folder."""
    from report.write import write  # here: the other commands need no template engine

    write(settings)


COMMANDS = {
    "pretrain": pretrain,
    "quantize": quantize,
    "reward": train_reward,
    "mle": train_mle,
    "ppo": train_ppo,
    "judge": use.judge,
    "eval": evaluate,
    "tables": use.show_tables,
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
