"""A guess at a text's language, good enough to keep the wrong ones out of a corpus.

Languages with a script of their own are recognised by their letters, those in Latin script by their commonest words. This works for
running text of a sentence or more. Code, formulas and mixtures give `None`, or the language of their comments.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# The commonest words that the others do not share, or share least.
_STOP_WORDS = {
    "en": "the of and to in is was for that with as on by are this be from at which have it not he they his were an or but what does do a "
    "has had can been than there more who when out",
    "de": "der die das und ist nicht ein eine zu den mit von auf für dem sich auch als im wird wie sind oder aber ich wir",
    "fr": "le la les et est des une un dans que pour pas sur qui au avec sont du ce il elle nous vous mais ou où",
    "es": "el la los las y es en que de un una por con para no se del al como más pero su fue son está",
    "it": "il la gli e è di che un una per con non sono della del nel alla anche come più ma questo si lo",
    "pt": "o a os as e é de que um uma para com não do da em no na por mais como mas foi são ao",
    "nl": "de het een en is niet van dat op te in voor met zijn aan er ook als maar om bij wordt deze wij",
}
_WORDS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}
_SCRIPTS = {
    "CYRILLIC": "ru",
    "GREEK": "el",
    "ARABIC": "ar",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "THAI": "th",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
}
LANGUAGES = tuple(sorted({*_WORDS, *_SCRIPTS.values()}))


def guess_language(text: str) -> str | None:
    """Code of the language (`LANGUAGES`), or None if the text is too short or mixed.

    The guess uses the first 4,000 characters. One language stands for each script (`ru` is any Cyrillic text).
    """
    letters: Counter[str] = Counter()
    head = text[:4000]
    for character, count in Counter(head).items():
        if character.isalpha():
            letters["LATIN" if character < "\u0250" else unicodedata.name(character, "?").split(" ")[0].split("-")[0]] += count
    total = letters.total()
    if total < 8 and not any(letters[script] for script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")):
        return None
    kana = letters["HIRAGANA"] + letters["KATAKANA"]
    if kana * 20 > total and (kana + letters["CJK"]) * 2 > total:  # Japanese mixes kana with Chinese characters
        return "ja"
    script = letters.most_common(1)[0][0]
    if letters[script] * 2 <= total:
        return None
    if script != "LATIN":
        return _SCRIPTS.get(script)
    words = re.findall(r"[^\W\d_]+", head.casefold())
    hits = {language: sum(word in stop for word in words) for language, stop in _WORDS.items()}
    best, second = sorted(hits, key=lambda language: hits[language], reverse=True)[:2]
    # English text holds 35 to 50 % of such words, code a few per cent.
    return best if hits[best] > hits[second] and hits[best] >= max(1, 0.1 * len(words)) else None
