"""What goes beyond the paper: negatives with one edit, negatives sampled by models, one reward a sequence, rewards from
any Python function. All of it is off by default.
"""

import importlib
import json
import random
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import exit_code, journal, learned

import data
import lastmile
import ppo
from beyond import hallucinations, reward_function
from interface import inputs
from safety import run as run_module

SMALL = "--train-examples 8 --eval-examples 6 --max-steps 4 --max-new-tokens 40 --log-every 1"


@pytest.fixture(scope="module")
def tokenizer(run_folder):
    return data.load_tokenizer(run_folder / "base")


@pytest.fixture(scope="module")
def positives(tokenizer):
    return data.encode(data.toy("test")[:60], tokenizer)[0]


def datum_of(tokenizer, source, target):
    return data.encode([data.Example("", source, target)], tokenizer)[0][0]


# ----------------------------------------------------------------------------------------------------------------------
# Hallucinations


OTHER = SimpleNamespace(source="Eve: the lamp in Rome? Call Carl.\nFinn: Yes.", target="Eve wants the lamp.")


@pytest.mark.parametrize(
    "kind, source, target, some, number",
    [
        ("speaker", "Amy: Hi\nBen: Hi", "Amy met Carl.", ["Ben met Carl."], 1),
        ("speaker", "Amy: Hi", "Amy met Carl.", [], 0),  # nobody to take her place
        ("name", "We saw Paris.", "They saw Paris.", ["They saw Eve.", "They saw Rome.", "They saw Carl."], 4),
        ("name", "On Monday I met OK.", "On Monday I left.", [], 0),  # no names: weekdays, I, capitals
        ("number", "", "They pay 12.", ["They pay 13.", "They pay 19."], 8),
        ("number", "", "The three won.", ["The two won.", "The twelve won."], 10),
        ("number", "", "They meet at 10:30, at 5 pm.", [], 0),  # times of day are of another kind
        ("time", "", "They meet at 10:30.", ["They meet at 9:30."], 11),
        ("time", "", "They meet at 4.30 pm on Friday.", ["They meet at 4.30 pm on Monday."], 11 + 6),
        ("time", "", "He may march.", [], 0),  # no months
        ("negation", "", "It is late.", ["It is not late."], 1),
        ("negation", "", "It isn't late.", ["It is late."], 1),
        ("negation", "", "They will go.", ["They won't go."], 1),
        ("negation", "", "They won’t go.", ["They will go."], 1),
        ("negation", "", "He wants tea.", ["He doesn't want tea."], 1),
        ("negation", "", "He doesn't want tea.", ["He wants tea.", "He does want tea."], 2),
        ("negation", "", "He can't go.", ["He can go."], 1),
        ("negation", "", "Go home.", [], 0),
        ("object", "Bring the cake.", "He has the cake.", ["He has the lamp."], 1),
        ("object", "The lamp and the cake.", "He has the cake.", [], 0),  # a lamp would be no lie
        ("object", "Bring a cake.", "He has a cake.", [], 0),  # "a lamp" stands nowhere: grammar gives nothing away
    ],
)
def test_edits_by_hand(kind, source, target, some, number):
    """Each kind changes one thing, in all the ways it can, and what it makes reads as if someone had written it."""
    edits = hallucinations.edits(SimpleNamespace(source=source, target=target), OTHER)[kind]
    made = [target[:start] + new + target[end:] for start, end, new in edits]
    assert set(some) <= set(made) and len(set(made)) == number and target not in made


@pytest.mark.parametrize(
    "target, edit, words",
    [
        ("Amy will go there on Friday.", (0, 3, "Olga"), ["Olga"]),
        ("Amy will go there on Friday.", (21, 27, "Monday"), ["Monday"]),
        ("Amy is here.", (4, 6, "is not"), ["not"]),
        ("Amy is not here.", (4, 10, "is"), ["here"]),  # the token behind the seam; "is" reads as in the truth
        ("They pay 17 or 27 now.", (9, 11, "27"), ["27"]),  # the 7 is the edit's too, though it stands in the truth
        ("Amy and Amy met.", (8, 11, "Ben"), ["Ben"]),
        ("Amy is not", (6, 10, ""), [""]),  # nothing stands behind the seam but EOS
    ],
)
def test_spans_by_hand(tokenizer, target, edit, words):
    """The span is the tokens of the edit, found after the whole text was encoded anew: no less, or the lie would be
    called true, and no more, or the truth would be called a lie.
    """
    start, end, new = edit
    truth, text = ([*tokenizer.encode(t), tokenizer.eos] for t in (target, target[:start] + new + target[end:]))
    first, last = hallucinations.touched(truth, text, len(target) - end, tokenizer.decode)
    assert tokenizer.decode(text[first:last]).split() == [word for word in words if word]
    assert 0 <= first < last <= len(text) and text[:first] == truth[:first]


def test_a_time_is_no_speaker():
    """ "10:30 we start" would make "10" a name, and the edits nonsense that any reward model sees at once."""
    source = "Anna: Hi!\n10:30 we start\nhttps://a.b is the place\nDr. Wu: fine\n"
    assert hallucinations.speakers(SimpleNamespace(source=source)) == ["Anna", "Dr. Wu"]


def test_hallucinations_as_a_set(positives, tokenizer):
    """One a datum, of several kinds, one class of six by weight; only the edit is labelled 0, or all of it; the same
    seed makes the same ones, and the other negatives stay as they are.
    """
    rows = data.with_negatives(positives, tokenizer, 60, 0, hallucinations.hallucinated)
    edited = [row for row in rows if row.kind in hallucinations.KINDS]
    assert len(edited) == 60 and len(Counter(row.kind for row in edited)) >= 5
    assert rows == data.with_negatives(positives, tokenizer, 60, 0, hallucinations.hallucinated)
    assert {row.weight for row in rows if row.kind != "positive"} == {1 / 6}
    plain = data.with_negatives(positives, tokenizer, 60, 0)
    assert [row.response for row in rows if row.kind not in hallucinations.KINDS] == [row.response for row in plain]
    batch = data.collate(edited)
    assert batch.judged.sum(1).tolist() == [len(row.judged) for row in edited]
    assert (batch.mask | ~batch.judged).all() and not batch.label.any()
    whole = [
        row
        for row in data.with_negatives(positives, tokenizer, 60, 0, partial(hallucinations.hallucinated, whole=True))
        if row.kind in hallucinations.KINDS
    ]
    assert [row.response for row in whole] == [row.response for row in edited]
    assert not data.collate(whole).label.any() and {row.judged for row in whole} == {None}


def test_without_an_edit_there_is_no_hallucination(tokenizer):
    """A text in which no kind finds anything, or which would grow over the cap, has none, rather than a false one."""
    dull, late = (datum_of(tokenizer, "hm", text) for text in ("Yes, so be it.", "It is late."))
    for datum, limit in [(dull, 60), (late, len(late.response))]:
        assert hallucinations.hallucinated(datum, dull, tokenizer, limit, random.Random(0)) == (None, None, None)
    assert hallucinations.hallucinated(late, dull, tokenizer, 60, random.Random(0))[0] == "negation"


def test_a_span_is_learned_where_it_is(positives, tokenizer):
    """The reward loss pulls the edit's tokens to 0 with the weight of a whole negative, and the others to 1 by a mean
    of their own: in a single mean over the output a name would hardly count.
    """
    rows = data.with_negatives(positives, tokenizer, 60, 0, hallucinations.hallucinated)
    row = next(row for row in rows if row.kind == "name")
    batch = data.collate([row])
    score = torch.full(batch.mask.shape, 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ppo.reward_loss(score, batch), score)
    n, edited = len(row.response), len(row.judged)
    expected = [1 / edited if i in row.judged else -1 / (n - edited) for i in range(n)]  # of 2 (0.5 - label) / tokens
    assert gradient[batch.mask].tolist() == pytest.approx(expected)


def test_reward_reports_kinds_of_edit(fresh_run, capsys):
    """The held-out report tells the kinds apart, and the span from the truth in its place; the log's positive and
    negative are those of tokens.
    """
    assert fresh_run("reward", *SMALL.split(), "--hallucinations", "span", "--eval-examples", 40) == 0
    out, report = capsys.readouterr().out, json.loads((fresh_run.folder / "reward/heldout.json").read_text())
    kinds = [kind for kind in report if kind in hallucinations.KINDS]
    assert len(kinds) >= 4 and "AUC of the truth in its place" in out
    for kind in kinds:
        assert 0 <= report[kind]["span_auc"] <= 1 and -9 < report[kind]["span_mean"] < 9
    assert set(report["shuffled"]) == {"mean", "auc"} and set(report["positive"]) == {"mean"}


# ----------------------------------------------------------------------------------------------------------------------
# Samples and rounds


@pytest.fixture
def seen_rows(monkeypatch):
    """The rows of each reward model's training that starts."""
    seen = []

    class Run(run_module.Run):
        def __init__(self, folder, stage, settings, rows, *rest, **named):
            seen.extend([rows] * (stage == "reward"))
            super().__init__(folder, stage, settings, rows, *rest, **named)

    monkeypatch.setattr(lastmile, "Run", Run)
    return seen


def test_samples_are_classes_of_negatives(fresh_run, seen_rows):
    """Each named model adds one sample an input, of its own adapter, label 0; the seven classes weigh 1/7 each, and the
    report has a line for each. The same command draws the same samples.
    """
    assert fresh_run("mle", *SMALL.replace("--eval-examples 6", "--learning-rate 1e-2").split()) == 0
    for _ in range(2):
        assert fresh_run("reward", *SMALL.split(), "--samples", "base,mle", "--overwrite") == 0
    rows, again = seen_rows
    assert rows == again
    assert Counter(row.kind for row in rows) == dict.fromkeys(
        ["positive", *data.NEGATIVES, "base_sample", "mle_sample"], 8
    )
    assert {(row.label, row.weight) for row in rows if row.kind != "positive"} == {(0.0, 1 / 7)}
    by_base, by_mle = ([row.response for row in rows if row.kind == f"{name}_sample"] for name in ("base", "mle"))
    assert by_base != by_mle and all(1 <= len(response) <= 40 for response in by_base + by_mle)
    report = json.loads((fresh_run.folder / "reward/heldout.json").read_text())
    assert "auc" in report["base_sample"] and "auc" in report["mle_sample"]


def test_a_true_sample_is_no_negative(positives, tokenizer):
    """A sample that reads as the truth would be called 0 and 1 at once: it is left out, however it was tokenized."""
    responses = [row.response for row in positives]
    spelled = [tokenizer.vocabulary[letter] for letter in "▁" + positives[0].target.replace(" ", "▁")]
    assert [*spelled, tokenizer.eos] != responses[0] and tokenizer.decode(spelled) == positives[0].target
    samples = {"x_sample": [[*spelled, tokenizer.eos], [7, tokenizer.eos], *responses[2:]]}
    rows = data.with_negatives(positives, tokenizer, 60, 0, samples=samples)
    assert [row.response for row in rows if row.kind == "x_sample"] == [[7, tokenizer.eos]]


def test_rounds_are_made_anew(fresh_run, seen_rows, capsys):
    """Two rounds are the truth twice, with other negatives and samples each time; one round is what it always was."""
    for rounds in (1, 2):
        flags = ["--samples", "base", "--hallucinations", "span", "--rounds", rounds, "--overwrite"]
        assert fresh_run("reward", *SMALL.split(), *flags) == 0
    once, twice = seen_rows
    n = len(once)
    assert twice[:n] == once and Counter(row.kind for row in twice)["positive"] == 16
    first, second = ({row.kind: [] for row in once} for _ in range(2))
    for half, rows in ((first, twice[:n]), (second, twice[n:])):
        for row in rows:
            half.setdefault(row.kind, []).append(row.response)
    assert first["positive"] == second["positive"] and first["copied_input"] == second["copied_input"]
    for kind in ("random_tokens", "mismatched", "shuffled", "repetitive", "base_sample"):
        assert first[kind] != second[kind]
    assert fresh_run("reward", *SMALL.split(), *flags, "--dry-run") == 0  # nothing is sampled, as much is counted
    assert f"  data     {len(twice)} rows" in capsys.readouterr().out


def test_samples_resume(fresh_run, monkeypatch, capsys):
    """Stopped after every step and taken up again, a run with samples ends with the same bits, and samples once: on
    another machine a token may differ. With another mle it is refused, since its samples were others.
    """
    assert fresh_run("mle", *SMALL.replace("--eval-examples 6", "").split()) == 0
    flags = [*SMALL.split(), "--samples", "mle", "--rounds", 2, "--hallucinations", "sequence"]
    assert fresh_run("reward", *flags) == 0
    file = fresh_run.folder / "reward/adapter_model.safetensors"
    whole = file.read_bytes()
    codes = [fresh_run("reward", *flags, "--overwrite", "--max-time", 1e-9)]
    codes += [fresh_run("reward", *flags, "--overwrite", "--max-time", 1e-9, "--resume") for _ in range(2)]
    assert codes == [143] * 3
    adapter = fresh_run.folder / "mle/adapter_config.json"
    text = adapter.read_text()
    adapter.write_text(text + " ")
    assert fresh_run("reward", *flags, "--overwrite", "--resume") == 2
    assert "changed since: mle adapter" in capsys.readouterr().err
    adapter.write_text(text)
    monkeypatch.setattr(lastmile.model, "sample", lambda *_, **named: pytest.fail("sampled again"))
    assert fresh_run("reward", *flags, "--overwrite", "--resume") == 0
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--samples base,best", "--samples base,best: choose among base, mle and policy"),
        ("--samples base,base", "--samples base,base: choose"),
        ("--samples mle", "mle: does not exist yet; run: python lastmile.py mle"),
        ("--rounds 0", "--rounds: 0 is out of range"),
        ("--hallucinations some", "--hallucinations: some is not one of off, span, sequence"),
    ],
)
def test_bad_negatives(fresh_run, capsys, flags, words):
    """Another name or number ends in one line before anything is trained or written."""
    assert exit_code(lambda: fresh_run("reward", *SMALL.split(), *flags.split())) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (fresh_run.folder / "reward").exists() and not (fresh_run.folder / "reward.partial").exists()


# ----------------------------------------------------------------------------------------------------------------------
# One reward a sequence


def test_the_last_token_carries_a_sequence(run_folder):
    """At level sequence the last response token alone is learned from and scored, EOS or not, whatever the padding."""
    batch = data.collate([data.Datum("", "", "", [1, 5], [7, 8, 9, 2]), data.Datum("", "", "", [1], [6], 0.0, 0.2)])
    last = torch.zeros_like(batch.mask)
    last[0, 5] = last[1, 1] = True
    assert torch.equal(ppo.scored_tokens(batch.mask, "sequence"), last)
    assert torch.equal(ppo.scored_tokens(batch.mask, "token"), batch.mask)
    score = torch.full(batch.mask.shape, 9.0)
    score[0, 5], score[1, 1] = 0.5, 2.0  # errors 0.25 of weight 1, 4 of weight 0.2
    assert ppo.reward_loss(score, batch, "sequence").item() == pytest.approx((0.25 + 0.2 * 4) / 1.2)
    llama = lastmile.model.load(run_folder / "base")
    llama.add_adapter("reward", 4, 8.0, ["q_proj"], torch.Generator().manual_seed(0), "normal")
    assert torch.equal(ppo.reward_scores(llama, batch, "sequence"), ppo.reward_scores(llama, batch) * last)


@pytest.mark.parametrize(
    "lam, value_learns, solved", [(0.95, True, True), (0.95, False, True), (0.0, True, True), (0.0, False, False)]
)
def test_a_reward_at_the_end_travels_back(lam, value_learns, solved):
    """The first of four actions decides, the last token is paid: credit must come back by eq. 2. Lambda brings it,
    or a value that has learned (then lambda 0 is enough), and not at all without both. Tables stand for networks.
    """
    B, T, g = 32, 4, torch.Generator().manual_seed(0)
    logits, table = torch.zeros(T, 2, 2, requires_grad=True), torch.zeros(T, 2, requires_grad=True)  # by time, by state
    adam = torch.optim.Adam([logits, table], lr=0.05)
    for _ in range(150):
        tokens = torch.ones(B, 1, dtype=torch.long)  # a prompt, then actions 0 or 1
        state, logp, value = torch.zeros(B, dtype=torch.long), [], []
        for t in range(T):
            chance = logits[t, state].log_softmax(-1)  # (B, 2)
            action = torch.multinomial(chance.exp().detach(), 1, generator=g)  # (B, 1)
            logp, value = [*logp, chance.gather(1, action)], [*value, table[t, state][:, None]]
            tokens, state = torch.cat([tokens, action], 1), action[:, 0] if t == 0 else state
        zero = torch.zeros(B, 1)
        batch = data.collate([data.Datum("", "", "", row[:1], row[1:]) for row in tokens.tolist()])
        score = ppo.scored_tokens(batch.mask, "sequence") * state[:, None].float()
        logp, value = torch.cat([zero, *logp], 1), torch.cat([zero, *value], 1)
        traj = ppo.trajectory(batch, logp, value, ppo.token_rewards(batch, score, 2.5), 0.99999, lam)
        loss = ppo.policy_loss(logp, traj, 0.2) + value_learns * ppo.value_loss(value, traj)
        adam.zero_grad()
        loss.backward()
        adam.step()
    chance = logits[0, 0].softmax(0)[1].item()
    assert chance > 0.9 if solved else chance == 0.5
    if value_learns:
        assert table[T - 1, 1].item() > 0.8 and abs(table[1, 0].item()) < 0.2


def test_ppo_scores_at_the_level_of_its_reward_model(fresh_run, capsys):
    """PPO reads the level where the adapter lies; adapters of other tools say nothing and score tokens. A run that goes
    on keeps its level, and a level that does not exist is refused.
    """
    flags = [*SMALL.split()[:2], *SMALL.split()[4:], "--save-every", 1]
    assert fresh_run("reward", *SMALL.split(), "--level", "sequence", "--hallucinations", "sequence") == 0
    file, llama = fresh_run.folder / "reward/config.json", lastmile.model.load(fresh_run.folder / "base")
    batch = data.collate([data.Datum("", "", "", [1, 5], [7, 8, 9, 2])])
    levels = [("sequence", file.read_text(), 1), ("token", "{}", 4), ("token", None, 4)]
    for name, text, n in levels:
        file.write_text(text) if text else file.unlink()
        score, facts = inputs.open_reward(SimpleNamespace(reward=str(file.parent), dry_run=False), llama, None)
        assert facts["reward level"] == name and score(batch).count_nonzero() == n
    file.write_text('{"level": "sequence"}')
    assert fresh_run("ppo", *flags, "--max-time", 1e-9) == 143
    file.unlink()
    assert fresh_run("ppo", *flags, "--resume") == 2
    assert "changed since: reward level" in capsys.readouterr().err
    file.write_text('{"level": "sequence"}')
    assert fresh_run("ppo", *flags, "--resume") == 0
    file.write_text('{"level": ["word"]}')
    assert fresh_run("ppo", *flags, "--overwrite") == 2
    assert "config.json: level ['word'] is neither token nor sequence" in capsys.readouterr().err
    assert fresh_run("reward", *flags, "--level", "sequence", "--hallucinations", "span", "--overwrite") == 2
    assert "--hallucinations sequence" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Rewards from any function


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into a new current folder and return its name: one no other test has, as imports are kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])

    def write(code):
        name = f"given_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(code)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return name

    return write


PPO = "--train-examples 8 --max-steps 4 --max-new-tokens 24 --log-every 1 --learning-rate 3e-2"


def test_words_end_at_their_last_token(tokenizer):
    """A word's number goes to the token that completes it, and only to that: not to "play" of "playing", nor to a
    byte in the middle of a character; the words that a function counts are those of the decoded text.
    """
    for text in ("Amy is playing  chess at 17:30 🙂 café.", "x", "  two\nlines", "🙂🙂"):
        response = [*tokenizer.encode(text), tokenizer.eos]
        ends = reward_function.word_ends(response, tokenizer.decode)
        words = tokenizer.decode(response).split()
        assert len(ends) == len(words) and ends == sorted(ends) and (len(response) - 1 not in ends)
        for n, end in enumerate(ends, 1):
            assert tokenizer.decode(response[: end + 1]).split() == words[:n]
            assert tokenizer.decode(response[:end]).split() != words[:n]
    assert reward_function.word_ends([tokenizer.eos], tokenizer.decode) == []
    assert reward_function.word_ends([5, 6], lambda ids: "a b" if len(ids) > 1 else "") == [
        1,
        1,
    ]  # one token may end two words


def test_grade_by_hand(tokenizer):
    """A number stands on the last token, a list on the words' last tokens, and all else is 0; the function sees source,
    reference and the prediction of its own row.
    """
    rows = [datum_of(tokenizer, "one", "Amy met Ben."), datum_of(tokenizer, "two", "Paul went home with Olga.")]
    batch, calls = data.collate(rows), []
    score = reward_function.word_scores(lambda *texts: calls.append(texts) or 0.5, batch, tokenizer.decode)
    assert torch.equal(score, 0.5 * ppo.scored_tokens(batch.mask, "sequence"))
    assert calls == [("one", "Amy met Ben.", "Amy met Ben."), ("two", *["Paul went home with Olga."] * 2)]
    score = reward_function.word_scores(lambda s, r, p: [len(word) for word in p.split()], batch, tokenizer.decode)
    for b, datum in enumerate(rows):
        ends = batch.prompt_len[b] + torch.tensor(reward_function.word_ends(datum.response, tokenizer.decode))
        assert score[b, ends].tolist() == [len(word) for word in datum.target.split()]
        assert score[b].count_nonzero() == len(ends)


def test_ppo_with_rouge(fresh_run):
    """la-rouge1-F1 is a reward without any reward model: truth is paid 1 for the last token, and nothing is trained or
    loaded beside policy and value.
    """
    assert reward_function.rouge("", "a b c d", "a b") == pytest.approx(0.5)
    assert fresh_run("ppo", *PPO.split(), "--reward", "rouge", "--ground-truth-fraction", 1) == 0
    assert {line["return"] for line in journal(fresh_run.folder / "ppo")} == {1.0}
    assert not (fresh_run.folder / "reward").exists()
    assert fresh_run("ppo", *PPO.split(), "--reward", "rouge", "--overwrite", "--dry-run") == 0


def test_ppo_learns_a_function(fresh_run, module):
    """A function of the current folder, one number a word, moves the policy: where each word costs 1, it says fewer.
    What it is given is what was sampled for that very input, in micro-batches too.
    """
    name = module(
        "seen = []\n"
        "def score(source, reference, prediction):\n"
        "    seen.append((source, reference, prediction))\n"
        "    return [-1.0 for word in prediction.split()]\n"
    )
    long = [*PPO.split(), "--train-examples", 64, "--batch-size", 64, "--max-steps", 24, "--ground-truth-fraction", 0]
    flags = ["--length-penalty", 0, "--micro-batch-size", 24, "--reward", f"{name}:score"]
    assert fresh_run("ppo", *long, *flags) == 0
    returns = [line["return"] for line in journal(fresh_run.folder / "ppo")]
    assert sum(returns[-5:]) > 0.7 * sum(
        returns[:5]
    )  # by seeds 1, 2, 3 and 1337: a quarter; in batches of 16 it is chance
    truth = {e.source: e.target for e in data.toy("train")}
    seen = sys.modules[name].seen
    assert len(seen) == 24 * 64 + 2 and all(truth[source] == reference for source, reference, _ in seen)


def test_a_function_in_a_file_named_as_ours(tmp_path, monkeypatch):
    """`--reward model:f` is the user's model.py, although lastmile has a module of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "model.py").write_text("import mine\ndef f(source, reference, prediction):\n    return mine.number\n")
    (tmp_path / "mine.py").write_text("number = 3\n")
    function, file = reward_function.load("model:f")
    assert function("", "", "") == 3 and file == tmp_path / "model.py"
    assert sys.modules["model"] is lastmile.model


def test_a_function_resumes(fresh_run, module, capsys):
    """Stopped and taken up again, with the same function, a run ends with the same bits; its file changed, or another
    function named, it is refused.
    """
    code = "def score(source, reference, prediction):\n    return len(prediction) / 50\n"
    name = module(code)
    flags = [*PPO.split(), "--reward", f"{name}:score"]
    assert fresh_run("ppo", *flags) == 0
    whole = learned(fresh_run.folder / "ppo")
    assert fresh_run("ppo", *flags, "--overwrite", "--max-time", 1e-9) == 143
    assert fresh_run("ppo", *flags[:-1], "rouge", "--overwrite", "--resume") == 2
    module(code + "# changed\n")
    assert fresh_run("ppo", *flags, "--overwrite", "--resume") == 2
    assert capsys.readouterr().err.count("changed since: reward function") == 2
    module(code)
    assert fresh_run("ppo", *flags, "--overwrite", "--resume") == 0
    assert learned(fresh_run.folder / "ppo") == whole


@pytest.mark.parametrize(
    "code, words",
    [
        (None, "cannot import it: ModuleNotFoundError"),
        ("def score(", "cannot import it: SyntaxError"),
        ("raise SystemExit(7)", "cannot import it: SystemExit: 7"),
        ("other = 1", "cannot import it: AttributeError: module 'NAME' has no attribute 'score'"),
        ("score = 1", "TypeError: 'int' object is not callable"),
        ("def score(source): return 1", "TypeError: score() takes 1 positional argument"),
        ("def score(s, r, p): return 1 / 0", "ZeroDivisionError: division by zero (PLACE/NAME.py:1)"),
        ("def score(s, r, p): return 1 / len(p)", "'': ZeroDivisionError"),  # of an answer that ends at once
        ("def score(s, r, p): return float('nan')", ": nan is neither a finite number nor a list of"),
        ("def score(s, r, p): return 1e99", ": 1e+99 is neither"),
        ("def score(s, r, p): return None", ": None is neither"),
        ("def score(s, r, p): return '1'", ": '1' is neither"),
        ("def score(s, r, p): return ['1' for _ in p.split()]", ": ['1', '1', "),
        ("def score(s, r, p): return [1]", ": [1] is neither a finite number nor a list of"),
    ],
)
def test_bad_functions(fresh_run, module, tmp_path, capsys, code, words):
    """Whatever is wrong with a function is said in one line before anything is trained, and leaves nothing behind."""
    name = module(code or "")
    if code is None:
        (tmp_path / f"{name}.py").unlink()
    assert fresh_run("ppo", *PPO.split(), "--reward", f"{name}:score") == 2
    error = capsys.readouterr().err
    assert f"--reward {name}:score" in error and error.count("\n") == 1
    assert words.replace("NAME", name).replace("PLACE", str(tmp_path)) in error
    assert not (fresh_run.folder / "ppo").exists() and not (fresh_run.folder / "ppo.partial").exists()


def test_a_function_that_fails_late_loses_nothing(fresh_run, module, capsys):
    """What goes wrong in the middle of a training is one line too, with exit code 2, and the checkpoints stand."""
    name = module(
        "calls = []\n"
        "def score(source, reference, prediction):\n"
        "    calls.append(0)\n"
        "    return 1.0 if len(calls) < 14 else float('inf')\n"
    )
    assert fresh_run("ppo", *PPO.split(), "--reward", f"{name}:score", "--save-every", 1) == 2
    assert ": inf is neither" in capsys.readouterr().err
    assert (fresh_run.folder / "ppo.partial/checkpoints/step-00000002").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Bad outputs that users already have, and tasks of labels


def table(folder, rows):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rejected_outputs_are_a_class_of_the_report(fresh_run, tmp_path, capsys):
    """TRL's prompt / chosen / rejected: the reward model learns from both and reports an AUC, mle learns chosen."""
    rows = [{"prompt": f"{i} and 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i} not."} for i in range(12)]
    rows.append({"prompt": "0 and 1?", "chosen": "It is 1.", "rejected": "It is 1."})
    folder = table(tmp_path / "sums", rows)
    flags = ["--data", folder, "--template", "plain", "--max-steps", "2", "--eval-examples", "6"]
    assert fresh_run("reward", *flags) == 0
    said = capsys.readouterr().out
    assert "train: 13 outputs are labelled bad: negatives" in said
    assert "train: 1 bad outputs are also a good output of the same input: left out" in said
    report = json.loads((fresh_run.folder / "reward/heldout.json").read_text())
    assert 0 <= report["rejected"]["auc"] <= 1
    assert fresh_run("mle", *flags[:-2]) == 0
    assert "train: 13 outputs are labelled bad: left to the reward model" in capsys.readouterr().out


def test_a_task_of_labels_trains(fresh_run, tmp_path, capsys):
    """Outputs yes / no at 2 : 1 were refused: what can be re-paired is, and the rest is counted. One text alone stays
    refused: there is nothing to tell apart.
    """
    rows = [{"input": f"Is {i} below 8?", "output": "yes" if i < 8 else "no"} for i in range(12)]
    folder = table(tmp_path / "labels", rows)
    flags = ["--template", "plain", "--max-steps", "2"]
    assert fresh_run("reward", "--data", folder, *flags) == 0
    said = capsys.readouterr().out
    assert "negatives: 4 examples have no mismatched negative: too many outputs are the same text" in said
    folder = table(tmp_path / "one", [{"input": f"{i}", "output": "yes yes no"} for i in range(12)])
    assert fresh_run("reward", "--data", folder, *flags, "--overwrite") == 2
    assert "all outputs are the same text" in capsys.readouterr().err
