"""Changes to valid inputs that are made at random: of JSON-like values, of text, of bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["ODD_TEXTS", "changed", "deep", "odd", "odd_bytes", "odd_words", "to_json"]

ODD_TEXTS = (
    "", " ", "0", "1", "-1", "1e400", "nan", "inf", "true", "null", "None", "a", "A" * 300, "x" * 5000, "é", "☃", "𝒳",
    "\x00", "a\x00b", "\x1b[31mred", "\n", "a\nb", "\r", "\t", "\ud800", "\udc80x", "\u2028", "\u202e", "..", "../x",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "~", "~nosuchuser/x", "C:\\x", "a/b", "./a", "*", "?", "[", "[!",
    "**", "*a*a*a*a*a*a*a*a*b", "(", "(a+)+$", "(?:a|a)*b", "(?P<x>", "\\", "%s", "%n", "{}", "{0}", "{i}", "$x", "'",
    '"', "#", "&a", "*a", "!!bool maybe", "<image>", "</script>", "=1+1", "@x", "+", "a+b", "a@b", "a:b", "weight",
    "model", "default", "float16", "bfloat16", "BF16", "F32", "F4", "torch.float32", "LORA", "lora", "ties", "linear",
    "0-5", "5-0", "9" * 30, "0x10", "1_000", "٣", "１",
)  # fmt: skip
"""Texts where something else is meant, or nobody thought of them."""

_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 256, -128, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    -(2**63) - 1, 10**9, 10**18, 10**30, 10**310, 0.0, -0.0, 0.5, 1.5, -2.5, 1e-320, 1e308, -1e308, 1e30,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_TOKENS = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "01", "0x1", ".5", "1.", "9" * 400, "9" * 5000,
    "-" + "9" * 5000, "1e999999999", "true", "null", "'a'", '"\\ud800"', '"\\u0000"', '"\\u001b[31m"', '"\\x"', "{}",
    "[]", "[[]]", "{", "}", "[", "]", ",", ":", "//x", "",
)  # fmt: skip
_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null')
_KEY = re.compile(r'"(?:[^"\\]|\\.)*"\s*:')
_WORDS = tuple(value.to_bytes(size, "little") for size in (1, 2, 4, 8) for value in (
    0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, 2 ** (4 * size),
))  # fmt: skip


def odd(random: Random, depth: int = 0) -> Any:
    """A JSON-like value that was not meant."""
    match random.randrange(12):
        case 0 | 1 | 2 | 3:
            return random.choice(_NUMBERS)
        case 4 | 5 | 6:
            return random.choice(ODD_TEXTS)
        case 7:
            return random.choice((None, True, False))
        case 8:
            return random.choice(([], {}, [[]], [None], [0], [""], {"": None}, {"a": {}}, [[], {}], [True, "a", 1.5]))
        case 9:
            return deep(random, random.choice((3, 60, 300)))
        case 10 if depth < 2:
            return [odd(random, depth + 1) for _ in range(random.randrange(5))]
        case _ if depth < 2:
            return {random.choice(ODD_TEXTS): odd(random, depth + 1) for _ in range(random.randrange(5))}
    return None


def deep(random: Random, depth: int) -> Any:
    """A value in so many lists or mappings."""
    value: Any = random.choice((None, 1, "a"))
    as_list = random.random() < 0.5
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def changed(value: Any, random: Random, times: int | None = None) -> Any:
    """A copy of a JSON-like value with one to four changes of its structure."""
    value = _copied(value)
    whole = {"": value}
    for _ in range(random.choice((1, 1, 2, 3, 4)) if times is None else times):
        _change(whole, random)
    return whole.get("")


def _change(whole: dict[str, Any], random: Random) -> None:
    holder, key = _place(whole, random)
    held = holder[key]
    match random.randrange(13):
        case 0 if isinstance(holder, dict) and holder is not whole:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.pop(key)
        case 2 if isinstance(holder, dict) and holder is not whole:
            holder[random.choice(ODD_TEXTS)] = holder.pop(key)
        case 3 if isinstance(held, dict):
            held[random.choice(ODD_TEXTS)] = odd(random)
        case 4 if isinstance(held, list):
            held.insert(random.randrange(len(held) + 1), _copied(random.choice(held)) if held else odd(random))
        case 5:
            other, place = _place(whole, random)  # something of elsewhere
            holder[key] = _copied(other[place])
        case 6:
            holder[key] = random.choice(([held], {"a": held}, str(held)[:2000], [held, held], {"default": held}))
        case 7 | 8 if isinstance(held, int | float) and not isinstance(held, bool):
            holder[key] = _number(held, random)
        case 9 if isinstance(held, str):
            holder[key] = _text(held, random)
        case _:
            holder[key] = odd(random)


def _place(whole: dict[str, Any], random: Random) -> tuple[Any, Any]:
    """A holder and a key in it, at any depth."""
    holder: Any = whole
    key: Any = ""
    while isinstance(inner := holder[key], dict | list) and inner and random.random() < 0.8:
        holder = inner
        key = random.choice(list(inner)) if isinstance(inner, dict) else random.randrange(len(inner))
    return holder, key


def _number(value: int | float, random: Random) -> Any:
    change: Callable[[Any], Any] = random.choice(
        (lambda one: one + 1, lambda one: one - 1, lambda one: -one, lambda one: one * 2, lambda one: one * 10**9,
         lambda one: one * 10**30, lambda one: one / 3, str, bool)
    )  # fmt: skip
    try:
        return change(value)
    except OverflowError:
        return float("inf")


def _text(value: str, random: Random) -> str:
    place = random.randrange(len(value) + 1)
    return random.choice(
        (value[:place], value[place:], value + random.choice(ODD_TEXTS), value[:place] + random.choice(ODD_TEXTS),
         value[:place] + random.choice(ODD_TEXTS) + value[place:], value.upper(), value * 2,
         value.replace(".", "..", 1), re.sub(r"\d+", lambda _: random.choice(("0", "9" * 25, "1000000", "-1")), value))
    )  # fmt: skip


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(held) for key, held in value.items()}
    return [_copied(held) for held in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, random: Random) -> bytes:
    """JSON, sometimes with changes that only its text can have: other tokens, a key twice, a great depth."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.9 or not _encodable(value))
    match random.randrange(14):
        case 0:
            text = _replaced(text, _SCALAR, random.choice(_TOKENS), random)
        case 1 if keys := list(_KEY.finditer(text)):
            key = random.choice(keys)
            text = f"{text[: key.start()]}{key[0]} {random.choice(_TOKENS)}, {text[key.start() :]}"
        case 2:
            around = random.choice((("[", "]"), ('{"a":', "}")))
            depth = random.choice((500, 20_000, 200_000))
            text = _replaced(text, _SCALAR, around[0] * depth + "1" + around[1] * depth, random)
        case 3:
            return odd_bytes(text.encode(), random)
    return text.encode()


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _replaced(text: str, what: re.Pattern[str], by: str, random: Random) -> str:
    found = list(what.finditer(text))
    if not found:
        return text + by
    one = random.choice(found)
    return text[: one.start()] + by + text[one.end() :]


def odd_bytes(data: bytes, random: Random, times: int | None = None) -> bytes:
    """A copy of some bytes with one to four changes: bits, numbers, ranges."""
    changed_data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3, 4)) if times is None else times):
        place = random.randrange(len(changed_data) + 1)
        other = random.randrange(len(changed_data) + 1)
        length = random.choice((1, 2, 4, 8, 16, 100))
        match random.randrange(9):
            case 0 if place < len(changed_data):
                changed_data[place] ^= 1 << random.randrange(8)
            case 1 if place < len(changed_data):
                changed_data[place] = random.randrange(256)
            case 2:
                del changed_data[place : place + length]
            case 3:
                changed_data[place:place] = random.randbytes(length)
            case 4:
                word = random.choice(_WORDS)
                changed_data[place : place + len(word)] = word
            case 5:
                changed_data[place:place] = changed_data[other : other + length]
            case 6:
                changed_data[place : place + length] = changed_data[other : other + length]
            case 7 if random.random() < 0.3:
                del changed_data[place:]
            case _:
                changed_data[place : place + 1] = random.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")[:50]
    return bytes(changed_data)


def odd_words(words: list[str], random: Random, more: tuple[str, ...] = ()) -> list[str]:
    """A command line with one to three changes."""
    words = list(words)
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(words) + 1)
        match random.randrange(6):
            case 0 if words:
                del words[min(place, len(words) - 1)]
            case 1 if more:
                words[place:place] = [random.choice(more), random.choice(ODD_TEXTS)]
            case 2 if more:
                words.insert(place, random.choice(more))
            case 3 if words:
                words.insert(place, random.choice(words))
            case _ if words:
                at = min(place, len(words) - 1)
                words[at] = _text(words[at], random) if random.random() < 0.4 else random.choice(ODD_TEXTS)
    return words
