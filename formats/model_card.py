"""The README.md of what a run leaves: a model card as the Hugging Face Hub reads it.

https://huggingface.co/docs/hub/model-cards: metadata in YAML between two lines of three dashes, then Markdown.
"""

import json
import re
from pathlib import Path

LICENSE = re.compile(r"^license:\s*['\"]?([\w.-]+)['\"]?\s*$", re.M)
IN_PEFT = """\
import peft, torch, transformers

base = transformers.{auto}.from_pretrained("{base}", dtype=torch.bfloat16{more})
model = peft.PeftModel.from_pretrained(base, "{folder}")
"""
WHOLE = """\
import torch, transformers

model = transformers.{auto}.from_pretrained("{folder}", dtype=torch.bfloat16)
"""
USE = {
    "reward": "It scores every token of an output, by the score head at the token itself: 1 for what looks like a true "
              "output, 0 for what does not.",
    "value": "It estimates the rest of the return before each token. It is of use only to train on.",
}  # fmt: skip


def license_of(folder):
    """The licence that a model folder names: its README's metadata, else config.json's; "" where none does."""
    readme, config = Path(folder) / "README.md", Path(folder) / "config.json"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        found = LICENSE.search(text.split("\n---", 1)[0]) if text.startswith("---\n") else None
        if found:
            return found[1]
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("license", "")
    except (OSError, ValueError, AttributeError):
        found = ""
    return found if isinstance(found, str) and re.fullmatch(r"[\w.-]+", found) else ""


def metadata(fields):
    """YAML of {name: text or list of texts}; what is empty is left out. JSON strings are YAML strings."""
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, list) and value:
            lines += [f"{name}:", *(f"- {json.dumps(item)}" for item in value)]
        elif value:
            lines.append(f"{name}: {json.dumps(value)}")
    return "\n".join([*lines, "---"])


def card(name, kind, base, licence, data, settings, commit, tables, whole):
    """The text of a model card.

    name: of the folder. kind: reward, mle, policy, value or merge. base: the Hub's name of the base, or its folder's.
    data: names of data sets. settings: {flag: value}, those that are not the defaults. commit: of the code. tables:
    {title: Markdown}, scores that are known. whole: a model of its own and not an adapter.
    """
    head = kind in ("reward", "value")
    auto = "AutoModelForSequenceClassification" if head else "AutoModelForCausalLM"
    on_hub = "/" in base
    about = metadata({
        "base_model": base if on_hub else "",
        "library_name": "transformers" if whole else "peft",
        "license": licence,
        "datasets": [item for item in data if "/" in item],
        "pipeline_tag": "" if head else "text-generation",
        "tags": ["lastmile", *([] if whole else ["lora"]), *(["reward-model"] if kind == "reward" else [])],
    })  # fmt: skip
    titles = {
        "reward": "a token-level reward model", "mle": "fine-tuned by maximum likelihood",
        "policy": "fine-tuned by reinforcement learning", "value": "the value model of a PPO run",
        "merge": "base and adapter as one model",
    }  # fmt: skip
    use = WHOLE if whole else IN_PEFT
    rows = [f"| {flag} | {value} |" for flag, value in settings.items()] or ["| all | the defaults |"]
    parts = [
        about,
        f"# {name}: {titles[kind]}",
        f"{'A model' if whole else 'A LoRA adapter'} made from {base} on {', '.join(data)} by lastmile, an engine for "
        f"the method of *Reinforcement Learning without Human Feedback for Last Mile Fine-Tuning of Large Language "
        f"Models* (Solway 2024, arXiv:2408.16753). {USE.get(kind, '')}".rstrip(),
        f"```python\n{use.format(auto=auto, base=base, folder=name, more=', num_labels=1' if head else '')}```",
        "The prompt is the template of the run: `template.txt`, or the chat template of the base.",
        *(f"## {title}\n\n{table}" for title, table in tables.items()),
        "## Settings that are not the defaults\n\n| flag | value |\n| --- | --- |\n" + "\n".join(rows),
        f"Commit {commit}.",
    ]
    return "\n\n".join(parts) + "\n"
