"""CaseOps: text -> the same text in lower case with operators for the capitals, and back, so that a tokenizer needs one
piece for the, The and THE (PR 1729; its name there is lossless_caps_caseops_v1, which is mode "plain").

    plain:  The McDonald NASA iPod  ->  [T]the [T]mc[C]donald [A]nasa i[C]pod
    fused:  The McDonald NASA iPod  ->  [T]the[T] mc[C]donald[A] nasa i[C]pod

[T] TITLE: the next letter is a capital. [A] ALLCAPS: all letters of the word are. [C] CAPNEXT: the next letter is one,
inside a word. A word is a run of ASCII letters; everything else is copied. Operators are private-use characters; one
that stands in the text itself is written behind [E] ESCAPE. Mode "fused" puts TITLE and ALLCAPS before the whitespace
that precedes the word. SentencePiece's pieces carry the space in front of their word; in plain mode an operator stands
between the two, and the space becomes a token of its own: 9 % of all tokens (PR 2109 fuses such pairs afterwards).

encode is injective and decode its inverse, for every text. SentencePiece may still normalize what it is given.
"""
import functools
import re
from typing import Any

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
MODES = ("plain", "fused")
MAX_COUNT = 65_535  # a sidecar holds uint16

OPERATOR = re.compile(f"[{OPERATORS}]")
ESCAPED = re.compile(f"{ESCAPE}[{OPERATORS}]")
CAPITAL = re.compile("[A-Z]")
CAPITALIZED = re.compile("(?<![A-Za-z])([A-Z][A-Za-z]*)")
SPACED = re.compile(f"([ \t\r\n]+)([{TITLE}{ALLCAPS}])")  # an operator of the text itself has ESCAPE before it
UNIT = re.compile(f"{ESCAPE}[{OPERATORS}]|{ALLCAPS}[ \t\r\n]*[a-z]+|{TITLE}[ \t\r\n]*[a-z]|{CAPNEXT}[a-z]|"
                  f"[{OPERATORS}]")


class CaseOpsError(ValueError):
    """A text that encode does not make."""


def lower_next(match: re.Match[str]) -> str:
    return CAPNEXT + match[0].lower()


@functools.lru_cache(1 << 16)
def lower_word(word: str) -> str:
    """A word that begins with a capital -> its operator and lower letters."""
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + CAPITAL.sub(lower_next, word[1:])


def encode(text: str, mode: str = "plain") -> str:
    """Text -> lower case with operators. About 20 MB/s: words with a capital are few, and most of them come again."""
    parts = CAPITALIZED.split(OPERATOR.sub(rf"{ESCAPE}\g<0>", text))
    parts[1::2] = map(lower_word, parts[1::2])
    text = CAPITAL.sub(lower_next, "".join(parts))  # what is left stands inside words with a small first letter
    return SPACED.sub(r"\2\1", text) if mode == "fused" else text


@functools.lru_cache(1 << 16)
def raise_unit(unit: str) -> str:
    """An operator with what it applies to -> text; nothing for an operator that applies to nothing."""
    return unit[1:] if unit[0] == ESCAPE else unit[1:].upper()


def decode(text: str, mode: str = "plain", strict: bool = True) -> str:
    """Lower case with operators -> text. CaseOpsError for what encode does not write in this mode.

    Not strict, it reads what a model or a normalizing tokenizer leaves of either mode and skips operators without use.
    """
    result = UNIT.sub(lambda match: raise_unit(match[0]), text)
    if strict and (again := encode(result, mode)) != text:
        place = next((i for i, (a, b) in enumerate(zip(text, again)) if a != b), min(len(text), len(again)))
        found = ascii(text[place:place + 1]) if place < len(text) else "the end"
        raise CaseOpsError(f"no CaseOps text ({mode}): character {place} is {found}, not as encode writes it")
    return result


def char_bytes(text: str) -> np.ndarray:
    """Encoded text -> (characters,) int64: UTF-8 bytes of the original text that each character stands for.

    Operators stand for none, an escaped one for its own three. UnicodeEncodeError for a lone surrogate.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    count = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    count[(codes >= ord(TITLE)) & (codes <= ord(ESCAPE))] = 0
    count[[match.end() - 1 for match in ESCAPED.finditer(text)]] = 3
    return count


def has_operators(tokenizer: Any) -> bool:
    """Whether a tokenizer has pieces for the operators, as one for CaseOps text does."""
    return tokenizer.unk_id() not in map(tokenizer.piece_to_id, OPERATORS)


def tokens_and_bytes(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Encoded text -> ids (n,) and bytes of original text (n,) of the tokens, as the published sidecars count them.

    A token stands for the characters that SentencePiece made it of: of bytes that spell one character the last one
    counts it, of spaces that were merged all count, and spaces at the ends, which it strips, count nowhere. A count
    over 65,535 (a run of so many spaces) is cut to that: fewer bytes never flatter a model.
    """
    found = tokenizer.encode(text, return_type="offset_mapping")
    before = np.concatenate(([0], np.cumsum(char_bytes(text))))
    spans = np.array(found["offsets"], np.int64).reshape(-1, 2)
    return np.array(found["ids"], np.uint16), np.minimum(before[spans[:, 1]] - before[spans[:, 0]], MAX_COUNT)
