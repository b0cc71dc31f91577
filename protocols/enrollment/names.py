"""Names that people choose for machines and accesses: in one form, and none that imitates another.

The skeleton of a name is what a person sees at a glance. The table has the look-alikes of Latin
letters that Unicode lists as confusables (UTS #39) in Cyrillic and Greek; letters of other scripts
cannot stand beside Latin ones.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache

from protocols.errors import Refused

MAX_CHARS = 64
#: Words that stand for something else in commands and logs.
RESERVED = frozenset(
    {
        *("coordinator", "operator", "operators", "observer", "broker", "commonweight"),
        *("all", "any", "anyone", "everyone", "nobody", "none", "null", "self", "unknown"),
    }
)
_PEER_ID = re.compile(r"[a-z2-7]{4}(-[a-z2-7]{4}){3}")
#: Control, format (bidirectional, zero width), surrogate, private, unassigned; line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_TOGETHER = frozenset(
    {"LATIN", "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL"}
)
#: Latin letters without an ASCII letter in them that languages write. Others are phonetic signs,
#: small capitals and the like, which look like plain letters.
_LATIN = frozenset("æœøðþßđħłŋŧəıƒ")
#: Capitals first, as some look like another letter than their small ones.
_CAPITALS = str.maketrans(
    "АВЕЅІЈКМНОРСТУХԚԜ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "abesijkmhopctyxqw" + "abezhikmnoptyx"
)
_LOOK_ALIKES = str.maketrans(
    "абвгдезіјкӏмнопрѕстуѵхһԁԛԝүє" + "αβγεζηικνορτυχωϲϳμ" + "01|ıi",
    "abbrde3ljklmhonpsctyvxhdqwye" + "abyeznlkvoptuxwcju" + "ollll",
) | str.maketrans("ー一\u1173丨\u1175〇\u110b", "---lloo")
_HINT = "choose another name: --name NAME"


def normalize_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels in their one form. Raises Refused for characters that cannot be seen."""
    for word in (*labels, *labels.values()):
        if any(unicodedata.category(letter) in _HIDDEN for letter in word):
            raise Refused(f"the label {word!a} has characters that cannot be seen", "--label K=V")
    return {
        unicodedata.normalize("NFKC", key).strip()[:MAX_CHARS]: (
            unicodedata.normalize("NFKC", value).strip()[:MAX_CHARS]
        )
        for key, value in labels.items()
    }


def normalize(name: str) -> str:
    """The name in its one form (NFKC, single spaces). Raises Refused if it cannot be read."""
    plain = " ".join(unicodedata.normalize("NFKC", name[: 4 * MAX_CHARS]).split())
    # Digits of other scripts look like other digits.
    plain = "".join(str(unicodedata.decimal(one, one)) for one in plain)
    if not plain or len(plain) > MAX_CHARS:
        raise Refused(
            f"a name has 1 to {MAX_CHARS} characters, and {plain!a} has {len(plain)}", _HINT
        )
    if any(unicodedata.category(letter) in _HIDDEN for letter in name):
        raise Refused(f"the name {plain!a} has characters that cannot be seen", _HINT)
    if not plain[0].isalnum():
        raise Refused(f"the name {plain!a} does not start with a letter or digit", _HINT)
    if strange := next(filter(_is_strange, plain), ""):
        raise Refused(f"the name {plain!a} has {strange!a}, which looks like another letter", _HINT)
    scripts = {unicodedata.name(one, "?").split()[0] for one in plain if one.isalpha()}
    if len(scripts) > 1 and not scripts <= _TOGETHER:
        raise Refused(f"the name {plain!a} mixes letters of several scripts", _HINT)
    return plain


def _is_strange(letter: str) -> bool:
    """True for a Latin letter that is no ASCII letter with marks, and that no language writes."""
    if not unicodedata.name(letter, "").startswith("LATIN "):
        return False
    return not unicodedata.normalize("NFKD", letter)[0].isascii() and letter.lower() not in _LATIN


@lru_cache(maxsize=65_536)
def skeleton(name: str) -> str:
    """What a name looks like: equal for names that a person could take for each other."""
    letters = unicodedata.normalize("NFKD", name)
    bare = "".join(one for one in letters if not unicodedata.combining(one))
    small = bare.translate(_CAPITALS).casefold().translate(_LOOK_ALIKES)
    return small.replace("rn", "m").replace("vv", "w")


def check_free(name: str, taken: Iterable[str]) -> None:
    """Raise Refused for a reserved word, an id, or a name that looks like one of `taken`.

    The very same name is no imitation: the caller numbers it.
    """
    seen = skeleton(name)
    if seen in _RESERVED_SKELETONS or _PEER_ID.fullmatch(name.casefold()):
        raise Refused(f"the name {name!a} stands for something else here", _HINT)
    for other in taken:
        if other != name and skeleton(other) == seen:
            raise Refused(f"the name {name!a} looks like {other!a}, which another has", _HINT)


_RESERVED_SKELETONS = frozenset(map(skeleton, RESERVED))
