"""What the gates look for in wordings, as regular expressions of many alternatives."""

from __future__ import annotations

import re


class Wording:
    """Alternatives that are looked for only where they can be: each in texts that hold one of its pieces, of which
    every match of it has one. Most texts hold none, and a piece is found many times faster than a pattern."""

    def __init__(self, *alternatives: tuple[str, str]) -> None:
        """``alternatives``: pieces in lower case, parted by ``|``, and the pattern that needs one of them."""
        self.whole = re.compile("|".join(f"(?:{pattern})" for _, pattern in alternatives), re.IGNORECASE)
        self.alternatives = [(needs.split("|"), re.compile(one, re.IGNORECASE)) for needs, one in alternatives]

    def search(self, text: str) -> re.Match[str] | None:
        """The first match of any."""
        if not text.isascii():  # A letter may match another that lower() does not make the same.
            return self.whole.search(text)
        plain = text.lower()
        for needs, alternative in self.alternatives:
            for piece in needs:
                if piece in plain:
                    if alternative.search(text):
                        return self.whole.search(text)
                    break
        return None


_SOURCE = (
    r"(?:captions?|transcripts?|transcription|narrat(?:ion|or|ive)(?:'s)?|remarks?|speaker(?:'s)?|lecturer(?:'s)?|lecture"
    r"|presenter(?:'s)?|video|audio|recording|cursor|mouse(?:\s+pointer)?|pointer|bounding box(?:es)?)"
)
_TEXT = r"(?:description|text|information|context|input|notes?|passage|prompt)"
_TELLS = (
    r"(?:mentions?|says?|states?|notes?|describes?|provided|given|does\s+not|doesn't|indicates?|refers?|specif(?:y|ies)"
    r"|lists?|tells?|explains?)"
)
_PERSON = r"(?:pathologist|expert|doctor|teacher|instructor)"
_PERSON_TELLS = (
    r"(?:says|said|mentions|mentioned|points?\s+out|pointed\s+(?:out|at|to)|states|stated|describes|described|notes|noted"
    r"|explains|explained|remarks|circled|circles)"
)
_GIVEN = r"(?:(?:provided|given|supplied|accompanying|above)\s+)?"

READS_CAPTION = Wording(
    (
        "caption|transcri|narrat|remark|speaker|lecture|presenter|video|audio|recording|cursor|mouse|pointer|bounding",
        rf"\b(?:the|this|your|an?|provided|given|supplied)\s+{_GIVEN}{_SOURCE}\b(?!\s+(?:form|factor|cells?|variants?))",
    ),
    (
        "description|text|information|input|note|passage|prompt",
        rf"\b(?:the|this|your|provided|given)\s+{_GIVEN}{_TEXT}\s+{_TELLS}\b"
        rf"|\b(?:according\s+to|based\s+on|per|from)\s+the\s+{_GIVEN}{_TEXT}\b",
    ),
    (
        "mentioned|described|stated|narrated|specified|noted|pointed",
        r"\b(?:as|is|are|was|were|not)\s+(?:(?:explicitly|clearly)\s+)?(?:mentioned|described|stated|narrated|specified"
        r"|noted)\s+(?:in|by|within)\s+the\s+(?!literature|who\b|guidelines?|classification)"
        r"|\b(?:is|are|was|were)\s+not\s+(?:explicitly\s+)?(?:mentioned|specified|stated|narrated)\b"
        r"|\b(?:it|this)\s+(?:is|was)\s+(?:also\s+)?(?:stated|mentioned|narrated|pointed\s+out)\s+that\b",
    ),
    (
        "pathologist|expert|doctor|teacher|instructor",
        rf"\b(?:the|a)\s+{_PERSON}\s+{_PERSON_TELLS}\b"
        rf"|\b(?:did|does|do|has)\s+(?:the|a)\s+{_PERSON}\s+(?:say|mention|point|state|describe|note|explain|circle)",
    ),
)
"""The writer speaks of the text it was given."""

REFUSES = Wording(
    ("as a", r"\bas an? (?:AI|artificial intelligence|(?:large )?language model|text[- ]based model)\b"),
    ("sorry|able", r"\bI(?:'m| am) (?:sorry|unable|not able)\b"),
    (
        "cannot|can't|can not|do not|don't",
        r"\bI (?:cannot|can't|can not|do not|don't) (?:actually )?(?:view|access|open|provide|assist|help)\b"
        r"|\bI (?:cannot|can't|can not|do not|don't) (?:actually )?(?:see|have|have access to) (?:the|this|any|an) "
        r"(?:actual )?images?\b",
    ),
    (
        "provided|given|attached|supplied|available",
        r"\b(?:image|picture) (?:was|is|has) not (?:been )?(?:provided|given|attached|supplied|available)\b",
    ),
)
"""The writer speaks as a program that cannot see."""

COORDINATES = Wording(
    (
        "[|(",
        r"[\[(]\s*-?\d*\.\d+\s*(?:,\s*-?\d*\.?\d+\s*){1,3}[\])]"
        r"|[\[(]\s*\d+\s*%?(?:\s*,\s*\d+\s*%?){3}\s*[\])]",
    ),
    ("=|:|≈|~", r"\b[xy][12]?\s*[=:≈~]\s*-?\d*\.?\d"),
    (
        "coordinate|axis|position|location",
        r"\b[xy][- ](?:coordinates?|axis|position)\b|\bcoordinates?\b|\bnormali[sz]ed (?:position|location)s?\b",
    ),
    (",", r"(?<![\d.])0?\.\d{1,3}\s*,\s*0?\.\d{1,3}(?![\d%])"),
)

_WRITTEN_ON = (
    r"(?:label|sign|slide title|title|caption|watermark|logo|scale bar|stamp|annotation|overlay|heading|subtitle"
    r"|banner)"
)
TEXT_IN_IMAGE = Wording(
    (
        "text|word|letter|website|url|channel|logo|watermark|title|email|number|name|writing",
        r"\b(?:what|which)\s+(?:text|words?|letters?|website|url|channel|logo|watermark|title|subtitle|email)\b"
        r"|\bwhat\s+(?:is|are|was)\s+(?:the\s+)?(?:text|words?|number|name)"
        r"\s+(?:on|in|at|shown|written|printed|displayed)\b"
        r"|\b(?:read|see|make\s+out)\s+(?:the|any)\s+(?:text|words?|letters|writing|lettering)\b",
    ),
    (
        "written|printed|typed|label|displayed",
        r"\b(?:is|are|was)\s+(?:written|printed|typed|labell?ed)\s+(?:on|in|at|across|over|under|below|above)\b"
        r"|\b(?:magnification|(?:case|slide|accession) number)\s+(?:is\s+)?"
        r"(?:written|printed|displayed|on\s+the\s+label)",
    ),
    (
        "say|read|state",
        rf"\bwhat\s+(?:does|do|did)\s+(?:the\s+|this\s+)?(?:\w+\s+)?{_WRITTEN_ON}s?(?:\s+\w+){{0,4}}"
        r"\s+(?:say|read|state)\b"
        rf"|\bthe\s+(?!caption){_WRITTEN_ON}\s+(?:says|reads|states)\b|\breads?\s+the\s+(?:text|{_WRITTEN_ON})\b",
    ),
)
"""Something written in the picture is asked for or told."""

SPEECH_NOISE = Wording((
    "tube|subscri|thank|next|hit the|like |music|applause|laughter|♪|patreon|subtitle|caption|amara|www.|http",
    r"\byou\s?tube\b|\bsubscri(?:be|bing|bers?)\b(?!\s+to\s+(?:the|this)\s+(?:view|theory|idea|classification))"
    r"|\bthank(?:s| you)(?: (?:all|so much|very much|guys))? for (?:watching|listening|viewing|joining)\b"
    r"|\b(?:see|catch) you (?:all |guys )?in the next (?:video|one|episode|lecture)\b|\bhit the (?:bell|like)\b"
    r"|\blike and (?:share|subscribe|comment)\b|\blike (?:button|this video)\b"
    r"|[\[(*♪]\s*(?:upbeat |soft |intro )?(?:music|applause|laughter)|♪"
    r"|\bpatreon\b|\bsubtitles by\b|\bcaptions? by\b|\bamara\.org\b|\bwww\.\w|\bhttps?:",
))
"""What speech recognition hears in silence, music and greetings."""

_MEANT_FOR_MODEL = (
    r"(?:instructions?|prompts?|directives?|guardrails"
    r"|your\s+(?:\w+\s+){0,2}?(?:commands?|rules|guidelines|training|programming))"
)
_MODEL = r"(?:ai|a\.i\.|assistant|model|bot|chatbot|agent|dan|gpt|llm|pirate|hacker|poet|translator|persona)"
INSTRUCTION = Wording(
    (
        "ignore|disregard|forget|override|bypass|neglect|not follow|n't follow|stop following",
        r"(?<!not )(?<!n't )(?<!never )\b(?:ignore|disregard|forget|override|bypass|neglect|do not follow|don't follow"
        r"|stop following)\s+"
        rf"(?:\w+\s+){{0,4}}?{_MEANT_FOR_MODEL}\b(?!\s+(?:of|for|from)\s+(?:the\s+)?(?:manufacturer|kit|company|stain))"
        r"|\b(?:ignore|disregard|forget)\s+(?:everything|all(?:\s+of)?|anything|what(?:ever)?)\s+(?:that\s+)?"
        r"(?:(?:was|is|came|you\s+were|you\s+have\s+been|i)\s+)?(?:said|told|above|before|prior|so far)\b"
        r"[^.]*\b(?:and|instead|now|reply|respond|answer|output|write|say)\b",
    ),
    ("attention", r"\bpay no attention to (?:what|anything|everything|whatever) (?:you|i)\b"),
    (
        "note|message|instruction|memo",
        r"\b(?:note|message|instruction|memo)s? (?:to|for) (?:the|any|every|all|an?) "
        r"(?:ai|a\.i\.|model|llm|language model)s?\b",
    ),
    (
        "you are no",
        r"\byou are (?:now|no longer)\s+(?:going to (?:be|act)|acting)\b"
        rf"|\byou are (?:now|no longer)\s+(?:an?|the|my)\s+(?:\w+\s+){{0,2}}?{_MODEL}\b"
        r"|\byou are now (?:dan|chatgpt|gpt|unrestricted|in developer mode)\b",
    ),
    (
        "act|behave|respond|pretend",
        r"\b(?:act|behave|respond|pretend)\s+(?:as|like|to be|as if you (?:are|were))\s+(?:an?\s+)?(?:\w+\s+){0,2}"
        r"(?:ai|assistant|language model|chatbot|pirate|dan|unrestricted)\b",
    ),
    (
        "prompt|message|instruction|developer mode|jailbr|#",
        r"\bsystem\s+(?:prompt|message|instruction)s?\b|\bdeveloper mode\b|\bjailbr(?:eak|oken)\b|\bprompt injection\b"
        r"|\b(?:print|reveal|repeat|show|output|leak|tell me)\s+(?:me\s+)?(?:your|the|all)\s+(?:\w+\s+)?(?:system\s+)?"
        r"(?:prompts?|instructions)\b"
        r"|###\s*(?:system|instruction|user|assistant)\b|\bend of (?:the )?(?:prompt|system message|instructions)\b",
    ),
    ("language", r"\bas an? (?:ai|large) language model\b"),
    (
        "reply|respond|answer|output|print|return",
        r"\b(?:reply|respond|answer|output)\s+(?:only\s+|just\s+|exactly\s+)*(?:with|in)\s+"
        r"(?:only\s+|just\s+|exactly\s+|the\s+(?:word|words|phrase|string|sentence)\b|json\b)"
        r"|\b(?:output|print|return)\s+(?:only|exactly|nothing but|the following)\b",
    ),
    (":", r"\bnew\s+(?:instructions?|task|system)\s*:"),
    ("<|[", r"<\|?\s*/?\s*(?:im_start|im_end|system|user|assistant|endoftext|inst)\b|\[/?(?:inst|sys(?:tem)?)\]"),
)
"""Words of a transcript that speak to a model."""

SOCIAL = re.compile(
    r"(?:so |and |now |but |ok(?:ay)? )*(?:"
    r"ok(?:ay)?|right|alright|yes|no|huh|correct|really|ready|you know|you see|see(?: that| it| this)?"
    r"|(?:do|can) you see(?: that| it| this| them)?|isn't it|aren't they|what else"
    r"|(?:are there )?any (?:other |more )?questions|do you have any questions|(?:does that )?make sense"
    r"|can (?:you|everyone|everybody)(?: all)? (?:see|hear)(?: me| my)?"
    r"(?: screen| slides?| cursor| pointer| mouse| ok| okay)*"
    r"|who(?: else)? wants to (?:try|go|answer)|should (?:we|i) (?:go|move) on|shall we(?: \w+){0,3}"
    r"|how are you(?: all)?(?: doing)?(?: today)?)"
)
"""A question, normalised, that asks nothing about a case; to be matched whole."""
