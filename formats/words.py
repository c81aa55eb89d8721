"""Words in every language, for ROUGE and for lengths; the paper has English only.

rouge-score drops everything but a-z and 0-9: identical Russian or Chinese texts would score 0. English keeps that
tokenizer, which is the paper's; other languages get one that knows Unicode.
"""

import unicodedata

NO_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"  # scripts without spaces
UNICODE_WORD = rf"{NO_SPACES}\p{{M}}*|(?!{NO_SPACES})[\p{{L}}\p{{N}}](?:(?!{NO_SPACES})[\p{{L}}\p{{N}}\p{{M}}])*"
FOREIGN_SHARE = 0.005  # of letters beyond ASCII; English has under 0.0002 (SAMSum, XSum), German and French over 0.02


def choose_tokenizer(references):
    """ "ascii" or "unicode" for a data set, by the share of letters beyond ASCII in its references."""
    text = "".join(references)
    letters = sum(c.isalpha() for c in text)
    foreign = sum(c.isalpha() and not c.isascii() for c in text)
    return "unicode" if foreign > FOREIGN_SHARE * letters else "ascii"


class AsciiTokenizer:
    """rouge-score's own words of a-z and 0-9, as in the paper; of a text without any, what stands between blanks.

    Example: AsciiTokenizer().tokenize("😀 !") -> ["😀", "!"]; identical outputs would otherwise score 0.
    """

    def tokenize(self, text):
        from rouge_score.tokenize import tokenize

        return tokenize(text, None) or text.split()


class UnicodeTokenizer:
    """Words of letters, digits and their combining marks; single characters in scripts without spaces.

    Example: UnicodeTokenizer().tokenize("für 公园!") -> ["für", "公", "园"]. Of a text without any: as AsciiTokenizer.
    """

    def tokenize(self, text):
        import regex  # here, so that a machine that only trains can do without it

        return regex.findall(UNICODE_WORD, unicodedata.normalize("NFC", text).lower()) or text.split()


def count_words(text, tokenizer):
    """The length of a text in words: between spaces ("ascii", the paper's), or in the tokenizer's units ("unicode")."""
    return len(text.split()) if tokenizer == "ascii" else len(UnicodeTokenizer().tokenize(text))
