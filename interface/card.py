"""What is known of a run, for the model card of a folder; see formats/model_card.py."""

from dataclasses import fields
from pathlib import Path

from eval import markdown
from formats.files import read_json
from formats.hub import on_hub
from formats.llama_folder import is_model
from formats.model_card import card, license_of
from formats.tables import PRESETS
from interface.flags import flag
from interface.folders import commit
from interface.settings import LORA
from safety.checkpoint import result_settings

SHOWN = ("la-rouge1-F1", "la-rouge2-F1", "la-rougeL-F1", "rouge1-F1", "excess_length")


def write_card(settings, base_folder, folder, kind):
    """Write README.md into a folder that a stage has filled. kind: reward, mle, policy, value or merge.

    A local base or data set is named by its last part: paths of this machine say nothing to others.
    """
    hub = on_hub(settings.model)
    base = hub[0] if hub else Path(settings.model).resolve().name
    preset = PRESETS.get(settings.data)
    data = [preset.repo if preset else Path(settings.data).name]
    text = card(
        Path(settings.push).name if settings.push else kind, kind, base, license_of(base_folder), data,
        changed(settings, kind), commit(), scores(settings, folder, kind), whole=is_model(folder),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def changed(settings, kind):
    """{flag: value} of the settings that change a result and are not the defaults."""
    values = result_settings(settings)
    if getattr(settings, "init", "base") != "base" and kind != "value":  # an adapter that --init names keeps its own
        values = {name: value for name, value in values.items() if name not in LORA}
    return {
        flag(f): values[f.name]
        for f in fields(settings)
        if f.name in values and values[f.name] != f.default and f.name not in ("device", "dtype")
    }


def scores(settings, folder, kind):
    """{title: Markdown} of the scores that are there: held-out AUCs of a reward model, the test scores of the run."""
    if kind == "reward" and (folder / "heldout.json").is_file():
        report = read_json(folder / "heldout.json")
        rows = [[name, f"{numbers['auc']:.3f}"] for name, numbers in report.items() if "auc" in numbers]
        return {"Held out": markdown([["negatives", "AUC of true outputs against them"], *rows])}
    file = Path(settings.output_dir) / "eval" / "scores.json"
    if kind != "merge" or not file.is_file():
        return {}
    found = read_json(file)
    names = [name for name in SHOWN if any(name in numbers for numbers in found.values())]
    rows = [[column, *(f"{numbers[name]:.3f}" for name in names)] for column, numbers in found.items()]
    return {"On the test split": markdown([["outputs of", *names], *rows])}
