"""Names of diagnoses: whether a text names one, in whatever wording."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from medllava.instruct_gen.wording import normalised, stem

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("adenocarcinoma", "glandular carcinoma"),
    ("squamous cell carcinoma", "squamous carcinoma", "epidermoid carcinoma", "SCC"),
    ("basal cell carcinoma", "basal cell epithelioma", "basalioma", "BCC"),
    ("melanoma", "malignant melanoma"),
    ("melanocytic nevus", "nevus", "naevus", "mole"),
    ("seborrheic keratosis", "seborrhoeic keratosis", "seborrheic wart"),
    ("actinic keratosis", "solar keratosis"),
    ("keratoacanthoma", "keratoacanthomatous carcinoma"),
    ("squamous cell carcinoma in situ", "bowen disease", "bowen's disease", "SCCIS"),
    ("ductal carcinoma in situ", "intraductal carcinoma", "DCIS"),
    ("lobular carcinoma in situ", "LCIS"),
    ("invasive ductal carcinoma", "carcinoma of no special type", "IDC"),
    ("invasive lobular carcinoma", "ILC"),
    ("hepatocellular carcinoma", "hepatoma", "HCC"),
    ("cholangiocarcinoma", "bile duct carcinoma"),
    ("clear cell renal cell carcinoma", "renal cell carcinoma", "clear cell carcinoma of the kidney", "RCC", "ccRCC"),
    ("urothelial carcinoma", "transitional cell carcinoma", "TCC"),
    ("papillary thyroid carcinoma", "papillary carcinoma", "PTC"),
    ("lymphocytic thyroiditis", "hashimoto thyroiditis", "hashimoto's thyroiditis", "hashimoto's disease"),
    ("schwannoma", "neurilemmoma", "neurilemoma"),
    ("glioblastoma", "glioblastoma multiforme", "GBM"),
    ("leiomyoma", "fibroid"),
    ("benign prostatic hyperplasia", "nodular hyperplasia of the prostate", "BPH"),
    ("hodgkin lymphoma", "hodgkin's lymphoma", "hodgkin's disease"),
    ("diffuse large b cell lymphoma", "DLBCL"),
    ("gastrointestinal stromal tumor", "GIST"),
    ("neuroendocrine tumor", "carcinoid", "carcinoid tumor"),
    ("nephroblastoma", "wilms tumor", "wilms' tumor"),
    ("pleomorphic adenoma", "benign mixed tumor"),
    ("angiolipoma", "angiolipomatous tumor"),
    ("myocardial infarction", "heart attack"),
    ("ulcerative colitis", "UC"),
    ("celiac disease", "coeliac disease", "celiac sprue", "gluten-sensitive enteropathy"),
    ("usual interstitial pneumonia", "UIP"),
    ("verruca vulgaris", "common wart"),
    ("dermatofibroma", "fibrous histiocytoma"),
)  # fmt: skip
"""Names of the same diagnosis. A recipe's ``synonyms`` adds to them."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_QUALIFIERS = _words(
    """invasive infiltrating metastatic metastasis primary recurrent well moderately moderate poorly differentiated high
    low intermediate grade classic conventional benign malignant early advanced acute chronic focal diffuse multifocal
    mild severe the a an of"""
)
_WHERE = re.compile(r"\s+(?:of|in(?!\s+situ)|at|involving|arising|with|from|on)\s+.*$|\s*[,(].*$")
_GENERIC = _words("carcinoma tumor neoplasm cancer lesion malignancy disease inflammation sarcoma cyst nodule")
_DISEASE = re.compile(r"(?:oma|itis|osis|emia|plasia|pathy|nevus|fibroid|carcinoid|disease|infarction|sprue)$")
_NO_DISEASE = _words(
    """hematoma stroma soma coma trauma plasma diagnosis mitosis necrosis apoptosis keratosis fibrosis
    parakeratosis hyperkeratosis orthokeratosis acanthosis spongiosis koilocytosis pyknosis prognosis stenosis sclerosis
    elastosis dysplasia hyperplasia metaplasia anaplasia desmoplasia neoplasia hypoplasia leukocytosis
    lymphocytosis thrombosis carcinoma sarcoma lymphoma cirrhosis ischemia anemia
    karyorrhexis diathesis"""
)


def names(diagnosis: str, synonyms: Mapping[str, Sequence[str]] | None = None) -> tuple[str, ...]:
    """``diagnosis``, its core without grade, spread and site, and what either is also called."""
    return _names(diagnosis, tuple((name, *others) for name, others in (synonyms or {}).items()))


# Each sample of a case asks for the names of its diagnosis, more than once.
@lru_cache(maxsize=4096)
def _names(diagnosis: str, synonyms: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    found = dict.fromkeys([diagnosis, _WHERE.sub("", diagnosis), _core(diagnosis)])
    groups = [*SYNONYMS, *synonyms]
    keys = {_key(name) for name in found}
    for group in groups:
        if keys & _keys(group):
            found |= dict.fromkeys(group)
    return tuple(name for name in found if name and _key(name) not in _GENERIC)


def named_in(text: str, names: Iterable[str]) -> str | None:
    """The first of the names that ``text`` holds, as it stands there, or None. Plurals, hyphens, compounds written
    apart and British spellings are the same; names in capitals (SCC) must be in capitals."""
    short, keys, initials, longest = _sought(tuple(names))
    for word in re.findall(r"\b[A-Za-z]{2,6}\b", text) if short else ():
        if word in short or (word.endswith("s") and word[:-1] in short):
            return str(word)
    words = normalised(text).split()
    for at, word in enumerate(words):
        if word[0] not in initials:
            continue
        before = ""
        # What _key makes of the words from here on, one after the other.
        for count, (inner, last) in enumerate(map(_part, words[at : at + longest]), start=1):
            if before + last in keys:
                return " ".join(words[at : at + count])
            before += inner
    return None


def is_named(text: str, diagnosis: str, synonyms: Mapping[str, Sequence[str]] | None = None) -> bool:
    return named_in(text, names(diagnosis, synonyms)) is not None


def known_in(text: str) -> str | None:
    """A diagnosis of :data:`SYNONYMS` that ``text`` names, or another word with the ending of a disease; else None."""
    known: str | None = named_in(text, (name for group in SYNONYMS for name in group))
    return known or next(diseases(text), None)


def are_same(one: str, other: str, synonyms: Mapping[str, Sequence[str]] | None = None) -> bool:
    """Whether two names can stand for one diagnosis: equal up to wording, or one holds the other."""
    return is_named(one, other, synonyms) or is_named(other, one, synonyms)


def diseases(text: str) -> Iterator[str]:
    """Words of ``text`` that name a disease, by their ending, with what directly qualifies them left out."""
    for word in normalised(text).split():
        single = stem(word)
        if _DISEASE.search(single) and single not in _NO_DISEASE:
            yield single


@lru_cache(maxsize=4096)
def _key(name: str) -> str:
    """The letters of a name, its last word in the singular: ``adeno-carcinomas`` is ``adenocarcinoma``."""
    words = [word.removesuffix("'s") for word in normalised(name).replace("cancer", "carcinoma").split()]
    return "".join([*words[:-1], *(stem(word) for word in words[-1:])])


@lru_cache(maxsize=4096)
def _keys(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(_key(name) for name in names)


@lru_cache(maxsize=4096)
def _sought(names: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], frozenset[str], int]:
    """Names in capitals, the keys of the others, the letters that these begin with (which neither plurals nor
    spellings change), and the most words that a name can be written in."""
    short = frozenset(name for name in names if _is_short(name))
    longest = max((len(name.split()) for name in names), default=0) + 1
    keys = _keys(tuple(name for name in names if name not in short))
    return short, keys, frozenset(key[:1] for key in keys), longest


@lru_cache(maxsize=65536)
def _part(word: str) -> tuple[str, str]:
    """What a normalised word adds to a key within a name, and at its end."""
    inner = word.replace("cancer", "carcinoma").removesuffix("'s")
    return inner, stem(inner)


def _core(diagnosis: str) -> str:
    words = normalised(_WHERE.sub("", diagnosis.strip().lower())).split()
    while words and (words[0] in _QUALIFIERS or words[0].isdigit()):
        words.pop(0)
    return " ".join(words)


def _is_short(name: str) -> bool:
    return len(name) <= 6 and sum(sign.isupper() for sign in name) >= 2
