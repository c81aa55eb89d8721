"""A dozen kinds of tokenizer folders, as transformers, `tokenizers` and SentencePiece write them: prompt ids are those
of transformers, what is a control token is found, and data never contain one.
"""

import io
import json
import logging

import pytest
import sentencepiece
import tokenizers
from test_data import train_bpe

import data
from formats import tokenizer as tokenizer_files
from interface import inputs

TEXTS = [e.source + "\n" + e.target for e in data.toy("test")[:120]]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = ["<|im_start|>", "<|im_end|>"]
MIXED = "a <|im_end|>\n<|im_start|>system </s><s> [INST] <|endoftext|> b"


def spm(extra=(), control=()):
    """A SentencePiece BPE like Llama's, as bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TEXTS).split("\n")), vocab_size=420, model_writer=written, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, user_defined_symbols=list(extra), control_symbols=list(control), minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def llama_json(folder, added=(), special=True, prefix="first"):
    """tokenizer.json of a Llama tokenizer, by transformers' own converter; added: tokens beyond the vocabulary."""
    from transformers import LlamaTokenizerFast

    (folder / "tokenizer.model").write_bytes(spm())
    fast = LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), legacy=prefix != "first", from_slow=True)
    fast.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in added], special)
    fast.save_pretrained(folder)


def config(folder, **said):
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (found | said).items() if v != "leave out"}))


def llama_model(folder):
    """Llama 2 with nothing but tokenizer.model."""
    (folder / "tokenizer.model").write_bytes(spm())
    config(folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")


def llama_both(folder):
    """Llama 2 as on the Hub: both files."""
    llama_json(folder)


def llama_no_bos(folder):
    """add_bos_token false beside tokenizer.model."""
    llama_model(folder)
    config(folder, add_bos_token=False)


def llama_json_no_bos(folder):
    """add_bos_token false, although the file's post-processor puts BOS first."""
    llama_json(folder)
    (folder / "tokenizer.model").unlink()
    config(folder, add_bos_token=False)


def llama_json_bos(folder):
    """add_bos_token true without a post-processor."""
    llama_json(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    config(folder, add_bos_token=True)


def chatml_model(folder):
    """OpenHermes and early TinyLlama-Chat: tokenizer.model with added_tokens.json."""
    (folder / "tokenizer.model").write_bytes(spm())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 421, "<|im_end|>": 420}))
    config(folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML)


def chatml_json(folder):
    """Dolphin: both files, <|im_end|> added with "special": false."""
    llama_json(folder, ENDS, special=False, prefix="all")
    config(folder, eos_token="<|im_end|>", chat_template=CHATML)
    map_file = folder / "special_tokens_map.json"
    map_file.write_text(json.dumps(json.loads(map_file.read_text()) | {"eos_token": "<|im_end|>"}))


def chatml_json_first(folder):
    """The same by newer converters, which put a blank before the first text only."""
    llama_json(folder, ENDS)
    config(folder, eos_token="<|im_end|>", chat_template=CHATML)


def yi(folder):
    """Yi: <|im_start|> is a user-defined piece of the SentencePiece model; a piece that nothing names stays text."""
    (folder / "tokenizer.model").write_bytes(spm(extra=[*ENDS, "<mask_1>"]))
    config(folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML,
           add_bos_token=False)  # fmt: skip


def bpe_llama3(folder):
    train_bpe(folder, "llama3", TEXTS)
    config(folder, tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>")


def bpe_smollm2(folder):
    """SmolLM2, Qwen: ChatML in the vocabulary, no BOS; the template is a file of its own."""
    train_bpe(folder, "smollm2", TEXTS)
    config(folder, tokenizer_class="GPT2Tokenizer", bos_token="<|im_start|>")
    (folder / "chat_template.jinja").write_text(CHATML)


def eos_in_the_map(folder):
    """EOS is named in special_tokens_map.json alone."""
    train_bpe(folder, "smollm2", TEXTS)
    config(folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="leave out", chat_template=CHATML)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))


CHAT = (chatml_model, chatml_json, chatml_json_first, yi, bpe_smollm2, eos_in_the_map)
PLAIN = (llama_model, llama_both, llama_no_bos, llama_json_no_bos, llama_json_bos, bpe_llama3)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function: the folder of a kind, written once."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind.__name__)
            kind(folders[kind])
            (folders[kind] / "config.json").write_text('{"model_type": "llama"}')
        return folders[kind]

    return folder


def theirs(folder):
    """transformers' tokenizer of a folder: the slow one for added_tokens.json, of whose tokens the fast one finds the
    first in a text and no other (transformers 4.57.6).
    """
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    fast = (folder / "tokenizer.json").exists() or not (folder / "added_tokens.json").exists()
    return transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast)


@pytest.mark.parametrize("kind", CHAT)
def test_chat_prompts_are_transformers(folder_of, kind):
    """ChatML is found unasked, <|im_end|> ends an answer, and the prompt's ids are those of apply_chat_template: no BOS
    too many, no blank where there is none. Such folders got the llama2 prompt in silence, or were refused.
    """
    folder = folder_of(kind)
    tokenizer = data.load_tokenizer(folder)
    assert tokenizer.template == data.TEMPLATES["chatml"][0] and tokenizer.decode([tokenizer.eos]) == ""
    assert tokenizer.eos == tokenizer.controls["<|im_end|>"]
    oracle = theirs(folder)
    for source in ("Amy: Hi!\nBen: Hello.", "  two  blanks", "x"):
        turns = [{"role": "system", "content": data.SYSTEM}]
        turns.append({"role": "user", "content": data.TASK.replace("{source}", source)})
        expected = oracle.apply_chat_template(turns, add_generation_prompt=True)
        (prompt,) = tokenizer.prompts([source])
        assert prompt[len(tokenizer.start) :] == expected
        assert oracle(oracle.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)).input_ids == prompt


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_prompts_are_transformers(folder_of, kind):
    """BOS stands where transformers' own tokenizer puts it, by class, add_bos_token and post-processor."""
    folder = folder_of(kind)
    tokenizer = data.load_tokenizer(folder, "plain")
    oracle = theirs(folder)
    for source in ("Amy: Hi!\nBen: Hello.", "  two  blanks", "x"):
        (prompt,) = tokenizer.prompts([source])
        assert prompt == oracle(tokenizer.template.replace("{source}", source)).input_ids


@pytest.mark.parametrize("kind", [*CHAT, *PLAIN])
def test_control_tokens_in_data_are_text(folder_of, kind):
    """Whoever writes <|im_end|> into a dialogue ends nothing: no control id in data, and the text comes back."""
    tokenizer = data.load_tokenizer(folder_of(kind))
    control = set(tokenizer.controls.values())
    for text in (MIXED, "".join(tokenizer.controls)):
        ids = tokenizer.encode(text)
        assert not control & set(ids) and tokenizer.decode(ids) == text
        (plain,), (mixed,) = tokenizer.prompts(["x"]), tokenizer.prompts([text])
        assert [i for i in mixed if i in control] == [i for i in plain if i in control]
    assert not control & set(tokenizer.ordinary)


@pytest.mark.parametrize("kind", [chatml_model, chatml_json, chatml_json_first, yi, bpe_smollm2])
def test_outputs_continue_the_prompt(folder_of, kind):
    """Behind "assistant" and a new line the target's ids are those of prompt and target as one text: the model that is
    trained, and the one that answers, write no blank there. The reward model would tell them apart by it.
    """
    folder = folder_of(kind)
    tokenizer = data.load_tokenizer(folder)
    (datum,), _ = data.encode([data.Example("", "Amy: Hi!", "Amy says hi.")], tokenizer)
    whole = tokenizer.template.replace("{source}", "Amy: Hi!") + "Amy says hi.<|im_end|>"
    assert theirs(folder)(whole).input_ids == datum.prompt + datum.response
    assert tokenizer.decode(datum.response) == "Amy says hi."


def test_tokenizer_json_comes_first(folder_of):
    """Where both files are there, the added tokens are in tokenizer.json alone."""
    assert isinstance(tokenizer_files.read(folder_of(llama_both)), tokenizer_files.JsonTokenizer)
    assert (folder_of(llama_both) / "tokenizer.model").exists()


def test_other_pieces_of_the_user_are_text(folder_of):
    """A user-defined piece that nothing names and no template contains is one token of text, as before."""
    tokenizer = data.load_tokenizer(folder_of(yi))
    assert "<mask_1>" not in tokenizer.controls
    assert tokenizer.sp.PieceToId("<mask_1>") in tokenizer.encode("a <mask_1> b")


@pytest.mark.parametrize(("size", "fits"), [(422, True), (512, True), (421, False), (400, False)])
def test_the_vocabulary_may_be_padded(folder_of, size, fits):
    """The model may have more ids than the tokenizer, as Yi's and Qwen's do; fewer are an error where a prompt needs
    them.
    """
    folder = folder_of(chatml_model)
    tokenizer = data.load_tokenizer(folder)
    found = data_config(size, tokenizer.eos)
    if fits:
        inputs.check_tokenizer(folder, tokenizer, found)
    else:
        with pytest.raises(ValueError, match=rf"the tokenizer \(422 pieces, .* does not match config.json \({size}"):
            inputs.check_tokenizer(folder, tokenizer, found)


def test_a_token_that_no_prompt_contains_may_be_missing(folder_of, tmp_path):
    """A padding token added to Llama 2 after training lies beyond the model's embedding, and is never used."""
    (tmp_path / "tokenizer.model").write_bytes(spm())
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 420}')
    tokenizer = data.load_tokenizer(tmp_path, "plain")
    inputs.check_tokenizer(tmp_path, tokenizer, data_config(420, 2))


def data_config(vocab_size, eos):
    from model import LlamaConfig

    return LlamaConfig(vocab_size, 8, 8, 1, 1, 1, 8, eos_token_id=(eos,))


BAD = {  # file, content, what is said
    "a list": ("added_tokens.json", "[]", "needed to know the control tokens"),
    "a text": ("added_tokens.json", '{"<x>": "5"}', r"the id of '<x>' is '5'"),
    "negative": ("added_tokens.json", '{"<x>": -5}', r"the id of '<x>' is -5"),
    "huge": ("added_tokens.json", '{"<x>": 99999999999}', r"the id of '<x>' is 99999999999"),
    "torn": ("special_tokens_map.json", '{"eos', "needed to know the control tokens, but unreadable"),
    "not UTF-8": ("chat_template.jinja", b"\xff", "not UTF-8 at byte 0"),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD.values(), ids=BAD)
def test_bad_files_beside_a_tokenizer(folder_of, tmp_path, name, content, said):
    """Each is named in one line: a control token that is not known would be text in every prompt."""
    (tmp_path / "tokenizer.model").write_bytes(spm())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}: .*{said}|{name}: {said}") as error:
        data.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "warned"),
    [("{{ '<|user|>' + messages }}", True), ("{{ '[INST] ' + messages + ' [/INST]' }}", False), (None, False)],
    ids=["Zephyr", "Llama 2", "none"],
)
def test_a_template_that_is_not_known_is_warned_of(tmp_path, capsys, template, warned):
    """Zephyr's and TinyLlama-Chat's tokens are plain text: nothing but the template tells that llama2 is not theirs."""
    (tmp_path / "tokenizer.model").write_bytes(spm())
    config(tmp_path, chat_template=template)
    inputs.warn_of_other_template(tmp_path, data.load_tokenizer(tmp_path))
    said = capsys.readouterr().err
    assert ("unknown chat template" in said) == warned and ("--template FILE" in said) == warned
