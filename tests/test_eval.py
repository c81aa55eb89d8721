"""Evaluation: the paper's metrics by hand, by the reference packages, and the paper's own numbers."""

import json
import random

import numpy as np
import pytest
import sentencepiece
import torch
from rouge_score import rouge_scorer

import data
import eval as ev
import lastmile
from beyond import reward_function
from formats.words import choose_tokenizer, count_words

WORDS = ["amy", "ben", "chess", "park", "noon", "friday", "the", "a", "at", "will", "meet", "play", "go", "cake"]


def text(rng, low=1, high=12):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def texts(seed, n):
    rng = random.Random(seed)
    return [text(rng) for _ in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [  # precision, recall, la-precision, la-recall, la-F1 of rouge1
        ("a b c d e f", "a b c", (1 / 2, 1, 1 / 2, 1 / 2, 1 / 2)),  # longer: recall is paid back
        ("a b", "a b c d", (1, 1 / 2, 1 / 2, 1 / 2, 1 / 2)),  # shorter: precision is
        ("a b x y", "a b c d", (1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2)),  # as long: nothing is
        ("x y", "a b c", (0, 0, 0, 0, 0)),
        ("a-b", "a b", (1, 1, 1 / 2, 1, 2 / 3)),  # one word for whitespace, two for ROUGE: here the three differ
    ],
)
def test_length_adjusted_rouge_by_hand(prediction, reference, expected):
    """Paper, 4.1: the adjusted metrics take back what ROUGE grants for being too long or too short."""
    found = ev.metrics([prediction], [reference])
    names = ("rouge1-precision", "rouge1-recall", "la-rouge1-precision", "la-rouge1-recall", "la-rouge1-F1")
    assert [found[name] for name in names] == pytest.approx(expected)


def test_length_adjusted_rouge_has_one_value():
    """Where ROUGE and whitespace count alike, all three are matches / max(n_p, n_g), as in the paper's three rows."""
    predictions, references = texts(0, 200), texts(1, 200)
    found = ev.metrics_by_example(predictions, references)
    for i, (p, g) in enumerate(zip(predictions, references, strict=True)):
        matches = sum(min(p.split().count(word), g.split().count(word)) for word in WORDS)
        value = matches / max(len(p.split()), len(g.split()))
        assert [found[f"la-rouge1-{part}"][i] for part in ev.PARTS] == pytest.approx([value] * 3)


def test_metrics_are_rouge_scores():
    """The plain rows are the package's own numbers, target first: swapped, precision and recall would trade places."""
    predictions, references = texts(2, 50), texts(3, 50)
    found = ev.metrics(predictions, references)
    assert set(found) == set(ev.ROWS) - {"bleurt"} | {"excess_length"}
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(target=g, prediction=p) for p, g in zip(predictions, references, strict=True)]
    for rouge in ev.ROUGES:
        for part, name in zip(ev.PARTS, ("fmeasure", "precision", "recall"), strict=True):
            assert found[f"{rouge}-{part}"] == pytest.approx(np.mean([getattr(score[rouge], name) for score in scores]))
    excess = [len(p.split()) - len(g.split()) for p, g in zip(predictions, references, strict=True)]
    assert found["excess_length"] == pytest.approx(np.mean(excess))


@pytest.mark.parametrize(
    ("prediction", "reference"), [("", "a b"), ("a b", ""), ("", ""), (" \n", "a b"), ("?!", "a b")]
)
def test_metrics_of_nothing(prediction, reference):
    """A model that answers nothing scores 0 in every row instead of dividing by 0."""
    found = ev.metrics([prediction], [reference])
    assert found.pop("excess_length") == len(prediction.split()) - len(reference.split())
    assert set(found.values()) == {0.0}


def test_metrics_refuses_unequal_lists():
    """One prediction lost would shift all others against their references."""
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        ev.metrics(["a"], ["a", "b"])


def test_auc():
    """The worked example of the docstring, and the three cases that fix the scale."""
    assert ev.auc([3, 2], [1, 2]) == 0.875
    assert ev.auc([1, 2], [0, -1]) == 1.0 and ev.auc([0], [1, 2]) == 0.0
    assert ev.auc([5, 5, 5], [5, 5]) == 0.5


def test_auc_of_many():
    """The number is that of all pairs, ties included; 200,000 scores of each kind, whose pairs would fill 40 GB."""
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 70), rng.integers(0, 7, 50)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert ev.auc(positive, negative) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert ev.auc(rng.normal(1, 1, 200_000), rng.normal(0, 1, 200_000)) == pytest.approx(0.7602, abs=0.005)


def test_interval():
    """The interval holds the mean, is the same for the same seed, and halves with four times the data."""
    values = np.random.default_rng(0).normal(size=1600)
    widths = []
    for n in (100, 400, 1600):
        low, high = ev.interval(values[:n], seed=1)
        assert low < values[:n].mean() < high and (low, high) == ev.interval(values[:n], seed=1)
        widths.append(high - low)
    assert widths[0] == pytest.approx(2 * 1.96 / 10, rel=0.25)  # the normal theory's width
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25) and widths[1] / widths[2] == pytest.approx(2, rel=0.25)


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def test_predict_keeps_the_order():
    """Prompts are batched by length; each answer must come back to its own datum."""
    rng = random.Random(0)
    rows = [data.Datum(str(i), "", "", [i] * rng.randint(1, 30), []) for i in range(23)]
    sizes = []

    def sample(prompts):
        sizes.append([len(prompt) for prompt in prompts])
        return [[prompt[0], len(prompt)] for prompt in prompts]

    answers = ev.predict(rows, sample, 5, decode=lambda ids: f"{ids[0]} {ids[1]}")
    assert answers == [f"{i} {len(row.prompt)}" for i, row in enumerate(rows)]
    assert [len(batch) for batch in sizes] == [5, 5, 5, 5, 3]
    assert sum(sizes, []) == sorted(sum(sizes, []))  # like lengths together: little is padded


@pytest.mark.parametrize(
    ("raw", "base", "mle"),
    [
        (
            "Sure, here is a summary:\n\nAmy meets Ben.\nAt noon.",
            "Amy meets Ben.\nAt noon.",
            "Sure, here is a summary:",
        ),
        ("Sure, Amy meets Ben.", "Sure, Amy meets Ben.", "Sure, Amy meets Ben."),
        ("\n Sure, here:\nAmy meets Ben.", "Amy meets Ben.", "Sure, here:"),
        ("Amy meets Ben.\nSure, she does.", "Amy meets Ben.\nSure, she does.", "Amy meets Ben."),
        ("\n\nAmy meets Ben.\n\nBen: hi", "Amy meets Ben.\n\nBen: hi", "Amy meets Ben."),
        ("Sure,\n", "Sure,", "Sure,"),
        ("", "", ""),
    ],
)
def test_cleaning(raw, base, mle):
    """The paper's two rules (4.3), also at their edges: two of the five columns are nothing but these rules."""
    assert ev.clean_base(raw) == base and ev.clean_mle(raw) == mle


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(
    ("of", "metric", "column", "number"),
    [
        ("samsum", "la-rouge1-F1", "mle", "0.39"),
        ("samsum", "bleurt", "base cleaned", "0.54"),
        ("samsum", "excess_length", "base", "39.2"),
        ("xsum", "excess_length", "policy", "-1.1"),
        ("xsum", "rougeL-recall", "mle cleaned", "0.32"),
    ],
)
def test_paper_numbers(of, metric, column, number):
    """The numbers beside ours must be the paper's, in its row and column."""
    assert ev.paper_numbers(of)[metric][column] == number


def test_paper_numbers_are_all_there(shared):
    """Every line of the paper's Table 2, as its text prints it: 19 rows of ten numbers, none mistyped."""
    lines = [line for line in (shared / "paper.txt").read_text().splitlines() if line.split(" ")[0] in ev.ROWS]
    ours = [
        " ".join([row, *(ev.paper_numbers(of)[row][column] for of in ev.PAPER_DATA for column in ev.COLUMNS)])
        for row in ev.ROWS
    ]
    assert sorted(lines) == sorted(ours)


def table(of, columns=ev.COLUMNS, bleurt=False, beside="auto"):
    metrics = ["excess_length", *ev.ROWS[0 if bleurt else 1 :]]
    scores = {column: {m: 0.123 + i for m in metrics} for i, column in enumerate(columns)}
    intervals = {column: {m: (value - 0.5, value + 0.5) for m, value in scores[column].items()} for column in columns}
    facts = dict(data=of, model="tiny", seed=7, commit="abc", n=3, bleurt="BLEURT-20" if bleurt else "none")
    return ev.tables(scores, intervals, facts, beside)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables():
    """Both tables, ours and the paper's number in turn, in the paper's rows; the conditions stand above them."""
    lines = table("xsum", bleurt=True).splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    assert [row[0] for row in rows if row[0].strip("-:")] == ["excess_length", *ev.ROWS]
    assert [row for row in rows if row[0] == ""] == [["", *(c for column in ev.COLUMNS for c in (column, "paper"))]] * 2
    body = {row[0]: row for row in rows}
    assert body["excess_length"][1:5] == ["0.1 ±0.5", "44.7", "1.1 ±0.5", "42.0"]
    assert body["bleurt"][-2:] == ["4.12 ±0.50", "0.49"]
    assert all(fact in lines[0] for fact in ("data xsum", "model tiny", "seed 7", "commit abc", "n = 3"))
    assert "no such data" not in lines[0] and "Table 1" in "".join(lines) and "bleurt: BLEURT-20" in "".join(lines)
    assert len({len(line) for line in lines if line.startswith("|")}) == 2  # aligned, each table for itself


def test_tables_say_what_is_missing():
    """No BLEURT is n/a, not 0; a column not evaluated is left out; other data stand beside SAMSum, and it is said."""
    lines = table("toy", columns=("base", "policy")).splitlines()
    assert "The paper has no such data" in lines[0]
    body = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert body["bleurt"] == ["bleurt", "n/a", "0.51", "n/a", "0.58"]
    assert body["rouge1-F1"] == ["rouge1-F1", "0.12 ±0.50", "0.31", "1.12 ±0.50", "0.50"]


def test_other_data_leave_the_paper_out():
    """The paper's SAMSum numbers beside another task look like a comparison and are none; --beside brings them back."""
    lines = table("reviews", columns=("base", "policy")).splitlines()
    body = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert body[""] == ["", "base", "policy"] and body["rouge1-F1"] == ["rouge1-F1", "0.12 ±0.50", "1.12 ±0.50"]
    assert "paper" not in lines[0]
    assert ev.paper_beside("reviews", "samsum") == "samsum" and ev.paper_beside("samsum", "none") == ""


@pytest.mark.parametrize(
    "of, beside, note",
    [
        ("xsum", "samsum", "The paper's numbers are those of SAMSum."),
        ("reviews", "xsum", "The paper has no such data: its XSum numbers are shown beside."),
    ],
)
def test_numbers_of_other_data_are_named(of, beside, note):
    """--beside with another name than the data's: the note says whose numbers these are, and nothing false."""
    assert table(of, beside=beside).splitlines()[0].endswith(f"bootstrap interval. {note}")


# ----------------------------------------------------------------------------------------------------------------------
# BLEURT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random BLEURT in the form of BLEURT-20: SentencePiece tokenizer, config and weights in one folder."""
    from bleurt_pytorch import BleurtConfig, BleurtForSequenceClassification
    from bleurt_pytorch.bleurt.tokenization_bleurt_sp import BleurtSPTokenizer

    folder = tmp_path_factory.mktemp("bleurt")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(0, 300)), vocab_size=48, model_prefix=str(folder / "spm"), minloglevel=2,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="[PAD]", unk_piece="[UNK]", bos_piece="[CLS]",
        eos_piece="[SEP]", user_defined_symbols=["[MASK]"], hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = BleurtSPTokenizer(str(folder / "spm.model"))
    tokenizer.save_pretrained(folder)
    config = BleurtConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BleurtForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_bleurt_is_the_package_s_own(checkpoint):
    """Batched and padded, the scores are those of the package pair by pair, reference first: the order changes them."""
    from bleurt_pytorch import BleurtForSequenceClassification
    from bleurt_pytorch.bleurt.tokenization_bleurt_sp import BleurtSPTokenizer

    encoder = BleurtForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = BleurtSPTokenizer.from_pretrained(checkpoint)
    predictions, references = [*texts(4, 7), ""], texts(5, 8)
    with torch.inference_mode():
        pairs = zip(references, predictions, strict=True)
        direct = [encoder(**tokenizer(g, p, return_tensors="pt")).logits.item() for g, p in pairs]
    assert ev.bleurt(predictions, references, checkpoint, batch_size=3) == pytest.approx(direct, abs=1e-5)
    assert np.abs(ev.bleurt(references, predictions, checkpoint) - direct).min() > 1e-3


def test_bleurt_cuts_long_pairs(checkpoint):
    """A base that rambles past the encoder's 512 positions gets the score of its beginning, not a crash."""
    words = random.Random(0).choices(WORDS, k=3000)
    long, longer, other = " ".join(words[:1500]), " ".join(words), " ".join(words[1500:])
    scores = ev.bleurt([long, longer, other], ["amy at noon"] * 3, checkpoint)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[0] - scores[2]) > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Languages

SAME = {
    "Russian": "Анна встретит Ивана в парке в шесть.",
    "Chinese": "安娜六点在公园见伊万。",
    "Thai": "แอนนาจะพบอีวานที่สวนสาธารณะ",
    "Arabic": "ستقابل آنا إيفان في الحديقة.",
    "Greek": "Η Άννα θα συναντήσει τον Ιβάν στο πάρκο.",
    "Hindi": "अन्ना पार्क में इवान से मिलेगी।",
}


@pytest.mark.parametrize("tokenizer", ["auto", "ascii", "unicode"])
def test_identical_symbols_score_one(tokenizer):
    """Emoji as labels have no words: identical outputs scored 0. Another emoji still does, and words are as before."""
    texts = ["😀", "👍🏽 😴", "!?", "Good 😀"]
    assert ev.metrics_by_example(texts, texts, tokenizer)["rouge1-F1"].tolist() == [1, 1, 1, 1]
    found = ev.metrics_by_example(["😡", "", "Good"], ["😀", "😀", "Good 😀"], tokenizer)
    assert found["rouge1-F1"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("language", SAME)
def test_identical_texts_score_one_in_every_language(language):
    """rouge-score's tokenizer keeps a-z and 0-9 only: identical texts in other scripts scored 0, in silence."""
    text = SAME[language]
    scores = ev.metrics([text], [text])
    assert {scores[f"{rouge}-F1"] for rouge in ev.ROUGES} == {1.0} and scores["excess_length"] == 0
    assert reward_function.load("rouge", [text])[0]("", text, text) == 1.0


def test_umlauts_are_letters():
    """ "fär" against "für" scored 1: both became "f r"."""
    german = "Anna trifft Jürgen um sechs im Park für eine Stunde."
    wrong = german.replace("für", "fär")
    n = len(german.split())
    assert ev.metrics([wrong], [german])["rouge1-F1"] == pytest.approx((n - 1) / n)


def test_chinese_lengths_are_characters():
    """A text five times too long in a script without spaces has one "word" between spaces; its characters count."""
    text = SAME["Chinese"]
    scores = ev.metrics([text * 5], [text])
    assert scores["excess_length"] == 4 * 10 and scores["la-rouge1-F1"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("language", SAME)
def test_length_adjustment_is_matches_over_the_longer_text(language):
    """Units of ROUGE and of lengths are the same, so that la-ROUGE is matches / max(n_p, n_g) in every language."""
    text = SAME[language]
    n = count_words(text, "unicode")
    longer = ev.metrics([f"{text} {text}"], [text])
    assert longer["la-rouge1-F1"] == pytest.approx(n / (2 * n))
    assert longer["la-rouge1-precision"] == longer["la-rouge1-recall"]


def test_english_scores_do_not_move(shared):
    """SAMSum and XSum have a few accents and emoji: auto must choose the paper's tokenizer, with the same scores."""
    for name in ("samsum", f"{shared}/data/xsum_test_1000.jsonl"):
        rows = data.load(f"{shared}/data/{name}" if name == "samsum" else name, "test")
        references = [row.target for row in rows][:200]
        assert choose_tokenizer([row.target for row in rows]) == "ascii"
        predictions = [row.source[:150] for row in rows][:200]
        auto = ev.metrics_by_example(predictions, references)
        scorer = rouge_scorer.RougeScorer(ev.ROUGES, use_stemmer=False)
        for i, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
            assert auto["rouge1-F1"][i] == scorer.score(reference, prediction)["rouge1"].fmeasure
            assert auto["excess_length"][i] == len(prediction.split()) - len(reference.split())


MINI = {  # the words of a sentence "NAME goes to PLACE with NAME", as (names, places, input, output)
    "Chinese": (["小明", "小红", "小刚", "小丽"], ["公园", "学校", "商店", "餐厅", "车站"],
                "{a}：我们去{b}吧？\n老王：好，去{b}！", "{a}和老王去{b}。"),
    "Arabic": (["سارة", "أحمد", "ليلى", "عمر"], ["الحديقة", "المدرسة", "السوق", "المتحف", "المطعم"],
               "{a}: هل نذهب إلى {b}؟\nخالد: نعم، إلى {b}!", "{a} يذهب إلى {b} مع خالد."),
}  # fmt: skip


@pytest.mark.parametrize("language", MINI)
def test_a_language_goes_through_the_stages(tmp_path, language, capsys):
    """20 rows of a language through pretrain, mle, eval and tables: outputs that repeat the references score near 1 and
    have their length. All of it was 0 before, whatever the model wrote.
    """
    names, places, source, target = MINI[language]
    rows = [{"input": source.format(a=a, b=b), "output": target.format(a=a, b=b)} for a in names for b in places]
    folder = tmp_path / "mini"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    common = ["--data", str(folder), "--output-dir", str(tmp_path / "run")]
    shape = "--hidden-size 64 --intermediate-size 128 --num-hidden-layers 2 --vocab-size 330 --no-chatter"
    assert lastmile.main(["pretrain", *common, *shape.split(), "--epochs", "99", "--max-steps", "40"]) == 0
    common += ["--model", str(tmp_path / "run/pretrain")]
    rate = "--learning-rate 2e-2 --epochs 99 --max-steps 60"
    assert lastmile.main(["mle", *common, *rate.split()]) == 0
    assert lastmile.main(["eval", *common, "--adapters", "base,mle", "--max-new-tokens", "60", "--bleurt", "none"]) == 0
    assert lastmile.main(["tables", *common]) == 0
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "run/eval/facts.json").read_text())
    scores = json.loads((tmp_path / "run/eval/scores.json").read_text())["mle"]
    assert facts["rouge_tokenizer"] == "unicode" and "unicode tokenizer" in said
    assert scores["la-rouge1-F1"] > 0.9 and abs(scores["excess_length"]) < 0.5
