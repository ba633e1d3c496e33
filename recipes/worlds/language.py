"""Words: picking among alternatives, names that nobody knows yet, comparing in writing."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Sequence
from datetime import date, timedelta

FIRST_DAY = date(2026, 1, 1)
ONSETS, VOWELS, CODAS = (
    letters.split(",")
    for letters in (
        "b,c,d,f,g,h,j,k,l,m,n,p,r,s,t,v,w,z,bl,br,ch,cl,cr,dr,fl,fr,gl,gr,pl,pr,sh,sl,sp,st,sw,th,tr",
        "a,e,i,o,u,ai,ea,ee,oa,ou",
        ",,b,d,ck,g,l,ll,m,n,nd,ng,nt,p,r,rd,rk,rn,s,st,t,th,x",
    )
)


def key(alternatives: str) -> str:
    """`order` of `order|purchase`."""
    return alternatives.partition("|")[0]


def pick(alternatives: str, rng: random.Random) -> str:
    return rng.choice(alternatives.split("|"))


def made_up(rng: random.Random, taken: Collection[str] = ()) -> str:
    """A word of two syllables that is not `taken`."""
    while True:
        syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(2))
        if (word := "".join(syllables)) not in taken:
            return word


def blended(rng: random.Random, words: Sequence[str]) -> str:
    """The first half of one word and the second of another: pieces in company that no text has them in."""
    first, last = rng.choice(words), rng.choice(words)
    return first[: len(first) // 2 + 1] + last[len(last) // 2 :]


def vary(phrase: str, rng: random.Random) -> str:
    """Pick one of each `[a|b]`."""
    chosen = re.sub(r"\[([^\]]*)\]", lambda match: rng.choice(match[1].split("|")), phrase)
    return re.sub(r" +([,.?]|$)", r"\1", re.sub(r" {2,}", " ", chosen)).strip()


def quoted(name: str, value: object) -> str:
    """A field as JSON writes it."""
    return f"{json.dumps(name)}: {json.dumps(value)}"


def date_of(day: int) -> str:
    """The date that lies so many days after the first of 2026; dates sort as their texts do."""
    return (FIRST_DAY + timedelta(day)).isoformat()


def day_of(date_text: str) -> int:
    return (date.fromisoformat(date_text) - FIRST_DAY).days


def compared(limit: int | str, value: int | str) -> str:
    """Digit by digit from the left, each pair before its sign: `35, 31: 33= 51>`. The last sign says which number or
    date is greater."""
    ours, theirs = str(limit), str(value)
    if len(ours) != len(theirs):
        seen = "longer" if len(ours) > len(theirs) else "shorter"
    else:
        first = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours) - 1)
        pairs = zip(ours[: first + 1], theirs[: first + 1], strict=True)
        seen = " ".join(f"{a}{b}{'=' if a == b else '>' if a > b else '<'}" for a, b in pairs)
    return f"{limit}, {value}: {seen}"
