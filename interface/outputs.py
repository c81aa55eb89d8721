"""What a stage leaves in its folder: an adapter or a whole model, tokenizer, model card; and --push to the Hub."""

from pathlib import Path

import model
from eval import markdown
from formats.errors import UserError
from formats.files import read_json
from formats.hub import HUB_ID, on_hub
from formats.llama_folder import copy_companions, is_model
from formats.tables import PRESETS
from interface import trained_on
from interface.settings import LORA, changed
from safety import ranks
from safety.checkpoint import result_settings
from safety.terminal import flag, say, warn

TITLES = {
    "reward": "a token-level reward model",
    "mle": "fine-tuned by maximum likelihood",
    "policy": "fine-tuned by reinforcement learning",
    "value": "the value model of a PPO run",
    "merge": "base and adapter as one model",
}
NOT_UPLOADED = ["checkpoints/*", "*.partial/*", f"*{trained_on.FILE}"]
SHOWN = ("la-rouge1-F1", "la-rouge2-F1", "la-rougeL-F1", "rouge1-F1", "excess_length")


def save_trained(settings, llama, tokenizer, rows, name, folder):
    """Write what a stage has trained on rows: an adapter, or with --tune full a whole model."""
    trained, adapter = llama.resolve(name)
    if adapter is None:
        folder.mkdir(exist_ok=True)
        save_model(settings, trained, tokenizer, folder)
    else:
        llama.save_adapter(name, folder, settings.model)
    write_template(tokenizer, folder)
    trained_on.write(folder, rows)
    write_card(settings, llama.folder, folder, name)


def save_model(settings, llama, tokenizer, folder, quantization=None):
    """Write a whole model: weights, config, and the base's tokenizer files."""
    model.save(llama, folder, quantization)
    eos_text = None if tokenizer.own_eos else tokenizer.end
    copy_companions(llama.folder, folder, llama.config.eos_token_id, eos_text)
    if settings.template:
        write_template(tokenizer, folder)


def write_template(tokenizer, folder):
    """Write the prompt into a folder, for `interface.inputs.load_trained` and for readers."""
    (folder / "template.txt").write_text(tokenizer.template, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The model card: https://huggingface.co/docs/hub/model-cards


def write_card(settings, base_folder, folder, kind):
    """Write README.md into a folder that a stage has filled. kind: reward, mle, policy, value or merge.

    A local base or data set is named by its last part: paths of this machine say nothing to others.
    """
    from huggingface_hub import ModelCardData

    hub, preset, whole = on_hub(settings.model), PRESETS.get(settings.data), is_model(folder)
    base = hub[0] if hub else Path(settings.model).resolve().name
    about = ModelCardData(
        base_model=hub and base,
        library_name="transformers" if whole else "peft",
        license=license_of(base_folder),
        datasets=[preset.repo] if preset else None,
        pipeline_tag=None if kind in ("reward", "value") else "text-generation",
        tags=["lastmile", *([] if whole else ["lora"]), *(["reward-model"] if kind == "reward" else [])],
    )
    text = f"""---
{about.to_yaml()}
---

# {Path(settings.push).name or kind}: {TITLES[kind]}

Made from {base} on {preset.repo if preset else Path(settings.data).name} by lastmile: *Reinforcement Learning without
Human Feedback for Last Mile Fine-Tuning of Large Language Models* (Solway 2024, arXiv:2408.16753). The prompt is in
template.txt, or is the chat template of the base. Settings that are not the defaults:

{settings_of(settings, kind) or "- none"}

{scores(settings, folder, kind)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def license_of(folder):
    """The license in the metadata of a model folder's README.md, or None."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(folder / "README.md") or {}).get("license")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def settings_of(settings, kind):
    """The settings that change a result and are not the defaults, a flag a line."""
    own = LORA if getattr(settings, "init", "base") != "base" and kind != "value" else ()  # --init's adapter keeps its
    names = result_settings(settings).keys() - {*own, "device", "dtype"}
    return "\n".join(f"- `{flag(name)} {value}`" for name, value in changed(settings).items() if name in names)


def scores(settings, folder, kind):
    """Held-out AUCs of a reward model, or the run's test scores beside a merged model, as Markdown."""
    if kind == "reward" and (folder / "heldout.json").is_file():
        report = read_json(folder / "heldout.json")
        rows = [[name, f"{numbers['auc']:.3f}"] for name, numbers in report.items() if "auc" in numbers]
        return markdown([["held out", "AUC of true outputs against them"], *rows])
    file = Path(settings.output_dir) / "eval" / "scores.json"
    if kind != "merge" or not file.is_file():
        return ""
    found = read_json(file)
    names = [name for name in SHOWN if any(name in numbers for numbers in found.values())]
    rows = [[column, *(f"{numbers[name]:.3f}" for name in names)] for column, numbers in found.items()]
    return markdown([["test split, outputs of", *names], *rows])


# ----------------------------------------------------------------------------------------------------------------------
# --push OWNER/NAME: a private model repository


def pushes(settings):
    """Whether this process is to upload something. Commands without --push never are."""
    return getattr(settings, "push", "") and not settings.dry_run and ranks.first()


def check_push(settings):
    """Raise UserError before hours of work unless --push names a repository, and the Hub knows the user's token."""
    if not pushes(settings):
        return
    import requests
    from huggingface_hub import constants, get_token

    name = HUB_ID.fullmatch(settings.push)
    if not name or name[2]:
        raise UserError(f"--push {settings.push}: is no repository of the Hub; name one as OWNER/NAME")
    token = get_token()
    if not token:
        raise UserError("--push: no token of the Hub; run .venv/bin/huggingface-cli login, or set HF_TOKEN")
    hub = constants.ENDPOINT
    try:  # HfApi().whoami() would wait forever for a server that does not answer
        headers = {"Authorization": f"Bearer {token}"}
        answer = requests.get(f"{hub}/api/whoami-v2", headers=headers, timeout=10)
    except requests.RequestException:
        raise UserError(f"--push: {hub} cannot be reached; connect, or upload later without --push") from None
    if answer.status_code != 200:
        raise UserError("--push: the Hub refuses the token; make another and set HF_TOKEN")
    is_adapter = getattr(settings, "tune", "full") == "lora"  # `merge` has no such setting: it pushes a whole model
    if is_adapter and not on_hub(settings.model):
        warn(f"--push: the base {settings.model} is a folder of this machine; who downloads an adapter needs it, too")


def push(settings, folder):
    """Upload a folder to --push, if there is one. Raises UserError with the command that does it later."""
    if not pushes(settings):
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(settings.push, private=True, exist_ok=True)
        api.upload_folder(repo_id=settings.push, folder_path=folder, ignore_patterns=NOT_UPLOADED)
    except OSError as error:  # every error of the Hub and of requests is one
        raise UserError(
            f"{folder}: finished, but not uploaded ({type(error).__name__}); run .venv/bin/huggingface-cli upload "
            f"{settings.push} {folder}"
        ) from None
    say(f"uploaded: {api.endpoint}/{settings.push}")
