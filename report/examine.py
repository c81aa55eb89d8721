"""The outputs of some test inputs, token by token, with the numbers that PPO would learn from.

Rewards come from the function that the PPO loop scores with (interface.inputs.open_reward): the reward model at its
level, or a reward function.
"""

from dataclasses import replace
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


def examine(settings, columns, rows):
    """(examples, note) for page.gallery: the reference and all outputs of some test inputs.

    columns: what interface.results.read_outputs returned; rows: numbers of test inputs. One pass of the reward model,
    one of the value, for each input. Without a reward, the texts alone.
    """
    run = Path(settings.output_dir)
    shown = [name for name in columns if name not in ("id", "source")]
    examples = [{"id": columns["id"][i], "source": columns["source"][i]} for i in rows]
    ppo_settings = reward_of_run(run, settings_of(run, "ppo"))
    if not ppo_settings.reward:
        for i, example in zip(rows, examples, strict=True):
            example["outputs"] = {name: {"tokens": [{"text": columns[name][i]}], "cut": False} for name in shown}
        return examples, "There is no reward model in this run, so the outputs have no numbers."
    llama, tokenizer = open_base(settings)
    examples_of_run = list(map(data.Example, columns["id"], columns["source"], columns["reference"]))
    score, _ = open_reward(ppo_settings, llama, tokenizer, examples_of_run)
    has_value = (run / "ppo" / "value").is_dir()
    if has_value:
        load_trained(llama, "value", run / "ppo" / "value", head=True)
    end_dry_run(settings, llama)
    cap = settings_of(run, "eval").max_new_tokens
    same = 0  # outputs whose tokens decode to their text
    for i, example in zip(rows, examples, strict=True):
        texts = {name: columns[name][i] for name in shown}
        raw = {name: columns[name.removesuffix(" cleaned")][i] for name in shown}
        outputs = tokens_of(tokenizer, texts, raw, cap)
        add_numbers(ppo_settings, llama, tokenizer, columns["source"][i], texts, outputs, score, has_value)
        example["outputs"] = outputs
        same += sum(decoded(output) == texts[name] for name, output in outputs.items())
    return examples, note_of(ppo_settings, same, len(rows) * len(shown), cap, has_value)


def settings_of(run, command):
    """The settings that a stage of the run was made with; the defaults where the stage is not there."""
    file = settings_file(run / command)
    found = read_settings(str(file), command) if file.is_file() else {}
    return COMMANDS[command](**found)


def reward_of_run(run, settings):
    """PPO's settings with a `reward` that can be opened, "" where there is none.

    A function, or a folder that exists: the run may have been moved since.
    """
    if reward_function.is_function(settings.reward):
        return settings
    for folder in (Path(settings.reward or run / "reward"), run / "reward"):
        if folder.is_dir():
            return replace(settings, reward=str(folder))
    return replace(settings, reward="")


def tokens_of(tokenizer, texts, raw, cap):
    """{name: {"tokens": [{"id", "text"}], "cut"}}: texts as token ids, with EOS unless the cap cut them.

    raw: the texts before cleaning. What cleaning has shortened at its end was not cut there by the cap.
    """
    outputs = {}
    for name, text in texts.items():
        full = len(tokenizer.encode(raw[name])) >= cap
        cut = full and name != "reference" and raw[name].strip().endswith(text.strip())
        tokens = pieces(tokenizer, tokenizer.encode(text))
        if not cut:
            tokens.append({"id": tokenizer.eos, "text": "EOS", "end": True})
        outputs[name] = {"tokens": tokens, "cut": cut}
    return outputs


def pieces(tokenizer, ids):
    """[{"id", "text"}]: the text that each token adds. A character of several tokens comes with its last one."""
    tokens = []
    done = ""
    for t in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:t])
        complete = now.startswith(done) and (t == len(ids) or not now.endswith("\ufffd"))
        tokens.append({"id": ids[t - 1], "text": now[len(done) :] if complete else ""})
        if complete:
            done = now
    return tokens


def decoded(output):
    """The text of an output's tokens, EOS apart."""
    return "".join(token["text"] for token in output["tokens"] if "end" not in token)


def add_numbers(s, llama, tokenizer, source, texts, outputs, score, has_value):
    """Add to every token of one input's outputs the numbers that PPO, with settings s, would learn from.

    score: Batch -> (B, T), as the PPO loop has it.
    """
    reference = len(outputs["reference"]["tokens"])
    prompt = tokenizer.prompts([source])[0]
    rows = []
    for output in outputs.values():
        response = [token["id"] for token in output["tokens"]]
        rows.append(data.Datum("", source, texts["reference"], prompt, response))
    batch = data.collate(rows, llama.device)
    batch = replace(batch, ref_len=torch.full_like(batch.ref_len, reference))
    with torch.inference_mode():
        scores = score(batch)  # (B, T)
        value = torch.zeros_like(scores)
        if has_value:
            h = llama(batch.tokens, "value", indices=ppo.indices_before(batch.mask))  # (n, C)
            value = ppo.fill(batch.mask, llama.scalar(h, "value"))  # (B, T)
        reward = ppo.token_rewards(batch, scores, s.length_penalty, s.reward_clamp)  # (B, T)
        traj = ppo.trajectory(batch, value, value, reward, s.gamma, s.lam)
    penalty = ppo.length_penalty(batch, s.length_penalty)
    found = {"reward": traj.reward, "score": scores, "penalty": penalty, "return": traj.ret}
    if has_value:
        found |= {"value": value, "advantage": traj.adv}
    for b, output in enumerate(outputs.values()):
        output["reference"] = reference
        for name, numbers in found.items():
            for token, x in zip(output["tokens"], numbers[b][batch.mask[b]].tolist(), strict=True):
                token[name] = x


def note_of(s, same, outputs, cap, has_value):
    """What the numbers are based on, for the page."""
    source = "the reward function " + s.reward if reward_function.is_function(s.reward) else "the reward model"
    kl = ", without the cost of KL" if s.kl_coef else ""
    values = f"Advantages: equation 2, gamma {s.gamma:g}, lambda {s.lam:g}."
    if not has_value:
        values = "There is no value model in this run."
    return (
        f"The outputs were encoded again from their texts: {same} of {outputs} give the same text back, and one of "
        f"{cap} tokens or more counts as cut by the cap. A token's reward is its score by {source}, minus "
        f"{s.length_penalty:g} beyond the reference's length{kl}. {values}"
    )
