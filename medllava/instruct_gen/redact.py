"""Names of people, dates, telephone and record numbers and addresses taken out of what was said, before it leaves.

Presidio does the work: its recognisers of patterns, and for names a recogniser of ours that needs no weights (titles,
introductions, lists of given names and surnames) or, better, a spaCy model that you have installed. Nothing is fetched.
What a vocabulary knows as a term (Hodgkin lymphoma, Gleason, Paget cells) is no person. No program finds every name:
read what you send.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from medllava.errors import ConfigError, MissingExtraError
from medllava.instruct_gen.captions import CaptionFile
from medllava.instruct_gen.concepts import Vocabulary
from medllava.instruct_gen.records import GroundedCaption

LABELS = {
    "PERSON": "[NAME]", "DATE_TIME": "[DATE]", "PHONE_NUMBER": "[PHONE]", "EMAIL_ADDRESS": "[EMAIL]",
    "RECORD_NUMBER": "[NUMBER]",
}
"""What is found, and what is put in its place."""

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|March|April|May|June|July|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?"
    r"|Dec(?:ember)?)"
)
_DAY = (
    r"(?:\d{1,2}(?:st|nd|rd|th)?|(?:twenty|thirty)[- ](?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth)"
    r"|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|(?:thir|four|fif|six|seven|eigh"
    r"|nine)teenth|twentieth|thirtieth)"
)
_PATTERNS = {
    "DATE_TIME": (
        rf"\b{_MONTH}\.?\s+(?:the\s+)?{_DAY}\b(?:,?\s+(?:19|20)\d\d)?",
        rf"\b(?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}\b(?:,?\s+(?:19|20)\d\d)?",
        rf"\b{_MONTH}\.?,?\s+(?:of\s+)?(?:19|20)\d\d\b",
        r"\b(?:19|20)\d\d-\d{1,2}-\d{1,2}\b|\b\d{1,2}[/.]\d{1,2}[/.](?:19|20)?\d\d\b",
    ),
    "EMAIL_ADDRESS": (
        r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b",
        r"\b\w+(?:\s+(?:dot|underscore|dash)\s+\w+)*\s+at\s+\w+(?:\s+dot\s+\w+)*\s+dot\s+(?:com|org|net|edu|gov|de|uk|ca)\b",
    ),
    "RECORD_NUMBER": (
        r"\b(?i:M\.?R\.?N\.?|medical record|record|accession|patient|specimen|hospital|social security|insurance|chart)"
        r"(?:\s+(?i:number|no\.?|id|identifier))?(?:\s+(?:is|was))?[:#\s]+(?=[\w-]*\d)[A-Za-z]{0,4}[-\d ]*\d[\w-]*",
        r"\b[A-Z]{1,3}\d{2}[- ]\d{3,7}\b",
        r"\b\d{3}-\d{2}-\d{4}\b",
    ),
}

_WORD = r"(?!I['’])[A-ZÀ-Ý][\w’'-]*[a-zà-ÿ]"
_PARTICLE = r"(?:van|von|de|der|den|da|al|el|bin|la|le)"
_FULL = rf"{_WORD}(?:\s+(?:[A-Z]\.\s*)?(?:{_PARTICLE}\s+)*{_WORD}){{0,2}}"
_TITLE = r"(?:Dr|Doctor|Prof|Professor|Mr|Mrs|Ms|Miss|Mister|Misses|Nurse)\b\.?"
_TITLED = re.compile(rf"\b{_TITLE}\s+(?P<name>(?:[A-Z]\.\s*)*(?:{_PARTICLE}\s+)*{_FULL})")
_TITLED_PLAIN = re.compile(rf"\b(?i:{_TITLE})\s+(?P<name>[a-z][\w’'-]+(?:\s+[a-z][\w’'-]+)?)")
_INTRODUCED = re.compile(
    r"\b(?P<cue>(?i:my name is|my name’s|my name's|named|name is|name was|signed by|courtesy of|i am|i'm|i’m|this is"
    r"|call me|called|thanks to|thank you|thanks|colleagues?|resident|fellow|hello|hi|dear|patient is|with me is))"
    r"\s*,?\s+"
    rf"(?P<name>{_FULL})"
)
_NAMES_ONLY = ("my name", "name", "signed", "courtesy")
"""Introductions that only a name can follow; behind the others one of the words must be in the lists."""
_PLAIN_NAME_CUE = re.compile(
    r"\b(?i:my name is|name is|name was|patient named|lady named|man named|woman named|hi i'm|hello i'm|i'm|i am)\s+"
    r"(?P<name>[a-z][\w’'-]+(?:\s+[a-z][\w’'-]+)?)"
)
_CAPITALISED = re.compile(rf"\b{_FULL}")
_NOUN_OF_EPONYM = re.compile(
    r"(?:['’]s?)?[\s-]+(?:disease|syndrome|sign|bod(?:y|ies)|cells?|tumou?rs?|sarcoma|lymphoma|carcinoma|thyroiditis|nodules?|"
    r"stains?|scores?|grad\w+|pattern|test|reaction|method|phenomenon|classification|criteria|system|esophagus|oesophagus|"
    r"rosettes?|fib(?:er|re)s?|inclusions?|glands?|ducts?|plexus|membranes?|nodes?|crystals?|granules?|rods?|spirals?|cysts?|"
    r"polyps?|naev\w+|nev\w+|corpuscles?|capsule|space|loops?|index|thickness|level|staging|contracture|anomaly|procedure)\b",
    re.IGNORECASE,
)


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ALSO_WORDS = _set_of(
    """abbey alba alma amber angel april art ash asia august aurora autumn bass bell bill bird black blake bliss
    blood bond booth brand brook brooks brown buck bush butcher camp cannon carol case cash chance charity chase
    cherry china christian church clay cliff cole cook cooper cross crystal dale daisy dawn day dean destiny
    diamond dick drew duke duncan earl early ebony eden ember eve faith fields finger fisher flowers ford forest
    foster fox frank french gage gale gardener garner gay gene german gill glass glenn gold good gore grace
    grant gray green grey guy hall hand hardy harmony harvey hay hays hazel head heaven hill holly hope house
    huff hunt hunter ice india iris ivory ivy jack jade jasmine jasper jean jewel joy june justice king knight
    lake lamb lance lane law lee levy lily little long love low lucky ma major marks marsh mark marshall mason
    max may mays melody mercy merit merry miles mill mills miller misty mobile moon moore moss myles nail noble
    north nova novel olive page paige paris park parker parks patience patton pace pearl penny pierce pike pine
    piper pitts place pope porter potter power powers price prince pope randy ray reed reese reid rhodes rich
    robin rose rowe royal ruby rush russell sage salt sands sandy savage scarlet serenity sharp shelf short
    sierra silver simple singleton skinner sky small smith snow sparks spring star stark steel sterling stone
    story street strong sue summer summers sunny swift sydney tanner taylor temple terry top toni trinity trip
    tucker turner van vance velvet victor victoria violet virginia wade walker wall walls ward ware warner water
    waters webb wells west white wilder will willow winter wise wolf wood woods worth wright york young"""
)
"""Names that are words as well: no names on their own, without a title, an introduction or a given name before them."""


class Redactor:
    """Takes out what tells who people are. Raises MissingExtraError without presidio, ConfigError for a model that is
    not there."""

    def __init__(self, vocabulary: Vocabulary, model: str | None = None) -> None:
        try:
            import presidio_analyzer
            import spacy
            from faker.providers.person.en_US import Provider
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError as error:
            raise MissingExtraError("presidio-analyzer", "redact", error) from error
        try:
            language = spacy.load(model) if model else spacy.blank("en")
        except OSError as error:
            raise ConfigError(
                f"--redact-model {model}: no such spaCy model; install one (python -m spacy download en_core_web_lg)"
            ) from error
        self.vocabulary = vocabulary
        self._known: dict[str, str] = {}
        given = {*Provider.first_names_male, *Provider.first_names_female}
        self._given = frozenset(name.lower() for name in given)
        self._surnames = frozenset(name.lower() for name in Provider.last_names)

        engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": model or "blank"}])
        engine.nlp = {"en": language}
        registry = presidio_analyzer.RecognizerRegistry(supported_languages=["en"])
        for entity, expressions in _PATTERNS.items():
            patterns = [presidio_analyzer.Pattern(entity.lower(), text, 0.8) for text in expressions]
            registry.add_recognizer(
                presidio_analyzer.PatternRecognizer(entity, patterns=patterns, global_regex_flags=re.MULTILINE)
            )
        from presidio_analyzer.predefined_recognizers import PhoneRecognizer, SpacyRecognizer

        self._entities = [*_PATTERNS, "PHONE_NUMBER", *(["PERSON"] if model else [])]
        registry.add_recognizer(PhoneRecognizer(supported_regions=("US", "GB", "DE", "IN", "CA"), leniency=1))
        if model:
            registry.add_recognizer(SpacyRecognizer(supported_entities=["PERSON"]))
        self._analyzer = presidio_analyzer.AnalyzerEngine(
            registry=registry, nlp_engine=engine, supported_languages=["en"], log_decision_process=False
        )

    def redact(self, text: str) -> str:
        """``text`` with a label in the place of each thing found."""
        known = self._known.get(text)
        if known is None:
            if len(self._known) > 20_000:
                self._known.clear()
            known = self._known[text] = self._redacted(text)
        return known

    def _redacted(self, text: str) -> str:
        found = [
            (result.start, result.end, result.entity_type)
            for result in self._analyzer.analyze(text, language="en", entities=self._entities, score_threshold=0.3)
            if result.entity_type != "PERSON" or not self._is_term(text, result.start, result.end)
        ]
        found += [(start, end, "PERSON") for start, end in self._names(text)]
        pieces, at = [], 0
        for start, end, kind in _without_overlaps(found):
            pieces += [text[at:start], LABELS[kind]]
            at = end
        return "".join([*pieces, text[at:]])

    def _names(self, text: str) -> Iterator[tuple[int, int]]:
        """Names by their titles, introductions and the lists of names; a title makes also an eponym a person."""
        for match in _TITLED.finditer(text):
            yield self._trimmed(text, *match.span("name"))
        for match in _TITLED_PLAIN.finditer(text):
            words = match.group("name").split()
            known = [word for word in words if self._is_name(word)]
            if known and self._is_name(words[0]):
                end = match.end("name") if len(known) == len(words) else match.start("name") + len(words[0])
                yield match.start("name"), end
        for match in _PLAIN_NAME_CUE.finditer(text):
            words = match.group("name").split()
            if len(words) == 2 and words[0] in self._given and self._is_name(words[1]):
                yield match.span("name")
            elif words[0] in self._given - _ALSO_WORDS:
                yield match.start("name"), match.start("name") + len(words[0])
        for match in _INTRODUCED.finditer(text):
            start, end = match.span("name")
            words = match.group("name").split()
            sure = match.group("cue").lower().startswith(_NAMES_ONLY) and len(words) > 1
            likely = sure or any(map(self._is_name, words))
            if likely and not self._is_term(text, start, end) and not self._is_sentence_start(text, start):
                yield start, end
        for match in _CAPITALISED.finditer(text):
            yield from self._listed(text, match)

    def _listed(self, text: str, match: re.Match[str]) -> Iterator[tuple[int, int]]:
        """Given names of the list, and what is written as a surname behind them."""
        words = [(word.group(), word.start() + match.start()) for word in re.finditer(r"\S+", match.group())]
        for number, (word, start) in enumerate(words):
            bare = re.sub(r"['’]s$", "", word)
            if bare.lower() not in self._given:
                continue
            followed = number + 1 < len(words)
            end = match.end() if followed else start + len(bare)
            if self._is_term(text, start, end) or (followed and self._is_term(text, start, start + len(bare))):
                return
            if followed or bare.lower() not in _ALSO_WORDS:
                yield start, start + len(re.sub(r"['’]s$", "", text[start:end]))
            return

    def _is_name(self, word: str) -> bool:
        bare = re.sub(r"['’]s$", "", word).lower()
        return bare in self._given or bare in self._surnames

    def _is_term(self, text: str, start: int, end: int) -> bool:
        """Whether a span is part of a term of the vocabulary, or an eponym before its noun."""
        name = text[start:end]
        if any(mention.start < end and start < mention.end for mention in self.vocabulary.link(text)):
            return True
        if name in self.vocabulary.eponyms or name.split()[0].removesuffix("'s").removesuffix("’s") in self._eponyms:
            return True
        return bool(_NOUN_OF_EPONYM.match(text, end))

    @cached_property
    def _eponyms(self) -> frozenset[str]:
        """Eponyms that are not given names: John in a list of eponyms would save every John."""
        return frozenset(name for name in self.vocabulary.eponyms if name.lower() not in self._given)

    def _is_sentence_start(self, text: str, start: int) -> bool:
        return text[:start].rstrip().endswith((".", "!", "?"))

    def _trimmed(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A titled name without the term that follows it: Dr. Smith | Hodgkin lymphoma."""
        for mention in self.vocabulary.link(text[:end]):
            if start < mention.start < end:
                end = mention.start
        name = re.sub(r"['’]s?$", "", text[start:end].rstrip())
        return start, start + len(name)


class RedactedFile(CaptionFile):
    """A file of captions of which nobody sees more than a redactor leaves; ids, times and boxes stay."""

    def __init__(self, path: Path, most: int | None, redactor: Redactor) -> None:
        super().__init__(path, most)
        self.redactor = redactor

    def __iter__(self) -> Iterator[GroundedCaption]:
        return map(self._redacted, super().__iter__())

    def of_video(self, video: str) -> list[GroundedCaption]:
        return [self._redacted(caption) for caption in super().of_video(video)]

    def counted(self) -> dict[str, int]:
        """How often each label was put into the captions."""
        counts: Counter[str] = Counter()
        for original, caption in zip(super().__iter__(), self, strict=True):
            for before, after in zip(original.phrases, caption.phrases, strict=True):
                counts.update({label: after.text.count(label) - before.text.count(label) for label in LABELS.values()})
        return {label: counts[label] for label in LABELS.values() if counts[label]}

    def _redacted(self, caption: GroundedCaption) -> GroundedCaption:
        phrases: list[Any] = [
            phrase.model_copy(update={"text": self.redactor.redact(phrase.text)}) for phrase in caption.phrases
        ]
        return caption.model_copy(update={"phrases": tuple(phrases)})


def _without_overlaps(spans: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Spans in order; of those that overlap the longest."""
    kept: list[tuple[int, int, str]] = []
    for span in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        if all(span[1] <= start or end <= span[0] for start, end, _ in kept):
            kept.append(span)
    return sorted(kept)
