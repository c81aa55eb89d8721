"""The outputs of some test inputs, token by token, with the numbers that PPO would learn from.

Rewards come from the function that the PPO loop scores with (interface.inputs.open_reward): the reward model at its
level, or a reward function.
"""

from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch

import data
import ppo
from beyond import reward_function
from interface.commands import COMMANDS
from interface.folders import settings_file
from interface.inputs import load_trained, open_base, open_reward
from interface.plan import end_dry_run
from interface.settings_files import read_settings


def settings_of(run, command):
    """The settings that a finished stage of the run was made with, or else the defaults. A reward model that is not
    where PPO's settings name it, because the run was moved, is looked for in the run; reward is "" if there is none.
    """
    file = settings_file(run / command)
    found = COMMANDS[command](**(read_settings(str(file), command) if file.is_file() else {}))
    if command != "ppo" or reward_function.is_function(found.reward):
        return found
    folders = [Path(found.reward or run / "reward"), run / "reward"]
    return replace(found, reward=next((str(folder) for folder in folders if folder.is_dir()), ""))


def examine(settings, columns, rows):
    """(examples, note): the reference and the outputs of some test inputs, {"id", "source", "outputs"} each.

    columns: what interface.results.read_outputs returned; rows: indices of test inputs. outputs: {name: {"tokens": list
    of {"text", "numbers", and "end" if it is EOS}, "cut": whether the cap cut it}}. Without a reward, the texts alone.
    Cleaned outputs are left out: no model has chosen these tokens.
    """
    run = Path(settings.output_dir)
    names = [name for name in ("reference", "base", "mle", "policy") if name in columns]
    examples = [{"id": columns["id"][i], "source": columns["source"][i]} for i in rows]
    s = settings_of(run, "ppo")
    if not s.reward:
        for i, example in zip(rows, examples, strict=True):
            example["outputs"] = {name: {"tokens": [{"text": columns[name][i]}], "cut": False} for name in names}
        return examples, "There is no reward model in this run, so the outputs have no numbers."
    llama, tokenizer = open_base(settings)
    dataset = list(map(data.Example, columns["id"], columns["source"], columns["reference"]))
    score, _ = open_reward(s, llama, tokenizer, dataset)
    has_value = (run / "ppo" / "value").is_dir()
    if has_value:
        load_trained(llama, "value", run / "ppo" / "value", head=True)
    end_dry_run(settings, llama)
    cap = settings_of(run, "eval").max_new_tokens
    numbers = partial(numbers_of, s, llama, score, has_value)
    for i, example in zip(rows, examples, strict=True):
        texts = {name: columns[name][i] for name in names}
        example["outputs"] = outputs_of(tokenizer, example["source"], texts, cap, numbers)
    source = f"the reward function {s.reward}" if reward_function.is_function(s.reward) else "the reward model"
    return examples, (
        f"Outputs are encoded again from their texts; one of {cap} tokens or more counts as cut by the cap. A token's "
        f"reward is its score by {source}, minus {s.length_penalty:g} beyond the reference's length"
        f"{', without the cost of KL' if s.kl_coef else ''}. "
        + (f"Advantages: equation 2, gamma {s.gamma:g}, lambda {s.lam:g}." if has_value else "There is no value model.")
    )


def outputs_of(tokenizer, source, texts, cap, numbers):
    """The outputs for one input, as `examine` returns them. texts: {name: text}, the reference first; numbers: list of
    Datum -> the numbers of each.
    """
    ids = {name: tokenizer.encode(text) for name, text in texts.items()}
    cut = {name: name != "reference" and len(ids[name]) >= cap for name in texts}
    prompt = tokenizer.prompts([source])[0]
    responses = [ids[name] + [tokenizer.eos] * (not cut[name]) for name in texts]
    rows = [data.Datum("", source, texts["reference"], prompt, response) for response in responses]
    outputs = {}
    for name, found in zip(texts, numbers(rows), strict=True):
        tokens = [{"text": text} for text in pieces(tokenizer, ids[name])]
        if not cut[name]:
            tokens.append({"text": "EOS", "end": True})
        for token, *of_token in zip(tokens, *found.values(), strict=True):
            token["numbers"] = dict(zip(found, of_token, strict=True))
        outputs[name] = {"tokens": tokens, "cut": cut[name]}
    return outputs


def numbers_of(s, llama, score, has_value, rows):
    """[{name: a number a token}] of each Datum, that PPO with settings s would learn from; the first is the reference.
    score: Batch -> (B, T), as the PPO loop has it.
    """
    batch = data.collate(rows, llama.device)
    batch = replace(batch, ref_len=torch.full_like(batch.ref_len, len(rows[0].response)))
    with torch.inference_mode():
        scores = score(batch)  # (B, T)
        value = torch.zeros_like(scores)
        if has_value:
            h = llama(batch.tokens, "value", indices=ppo.indices_before(batch.mask))  # (n, C)
            value = ppo.fill(batch.mask, llama.scalar(h, "value"))  # (B, T)
        reward = ppo.token_rewards(batch, scores, s.length_penalty, s.reward_clamp)  # (B, T)
        traj = ppo.trajectory(batch, value, value, reward, s.gamma, s.lam)
    found = {"reward": reward, "score": scores, "penalty": ppo.length_penalty(batch, s.length_penalty)}
    found |= {"value": value, "advantage": traj.adv} if has_value else {}
    found["return"] = traj.ret
    return [{name: x[b][mask].tolist() for name, x in found.items()} for b, mask in enumerate(batch.mask)]


def pieces(tokenizer, ids):
    """The text that each token adds; a character of several tokens comes with its last one."""
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:t]).rstrip("\ufffd")) for t in range(len(ids))] + [len(text)]
    return [text[start:end] for start, end in pairwise(accumulate(ends, max))]
