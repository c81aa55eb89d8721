"""What a stage leaves in its folder: an adapter or a whole model, with tokenizer and model card."""

import model
from formats.llama_folder import copy_companions
from interface.card import write_card


def save_trained(settings, llama, tokenizer, name, folder):
    """Write what a stage has trained: an adapter, or with --tune full a whole model."""
    trained, adapter = llama.resolve(name)
    if adapter is None:
        folder.mkdir(exist_ok=True)
        save_model(settings, trained, tokenizer, folder)
    else:
        llama.save_adapter(name, folder, settings.model)
    write_template(tokenizer, folder)
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
