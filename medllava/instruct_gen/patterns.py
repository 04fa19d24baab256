"""What the gates look for in wordings, as regular expressions; each is a list of alternatives, one or two a line."""

from __future__ import annotations

import re


class Wording:
    """A pattern that is looked for only where it can be: in texts that hold one of the pieces ``needs``, of which every
    match has one. Most texts hold none, and a piece is found many times faster than a pattern with alternatives."""

    def __init__(self, pattern: str, needs: str) -> None:
        self.pattern = re.compile(pattern, re.IGNORECASE)
        self.needs = tuple(needs.split("|"))

    def search(self, text: str) -> re.Match[str] | None:
        if text.isascii():  # Beyond ASCII a letter may match another that lower() does not make the same.
            plain = text.lower()
            for piece in self.needs:
                if piece in plain:
                    break
            else:
                return None
        return self.pattern.search(text)


def _any_of(*alternatives: str, needs: str) -> Wording:
    return Wording("|".join(f"(?:{one})" for one in alternatives), needs)


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

READS_CAPTION = _any_of(
    rf"\b(?:the|this|your|an?|provided|given|supplied)\s+{_GIVEN}{_SOURCE}\b(?!\s+(?:form|factor|cells?|variants?))",
    rf"\b(?:the|this|your|provided|given)\s+{_GIVEN}{_TEXT}\s+{_TELLS}\b",
    r"\b(?:as|is|are|was|were|not)\s+(?:(?:explicitly|clearly)\s+)?(?:mentioned|described|stated|narrated|specified|noted)"
    r"\s+(?:in|by|within)\s+the\s+(?!literature|who\b|guidelines?|classification)",
    r"\b(?:is|are|was|were)\s+not\s+(?:explicitly\s+)?(?:mentioned|specified|stated|narrated)\b",
    rf"\b(?:according\s+to|based\s+on|per|from)\s+the\s+{_GIVEN}{_TEXT}\b",
    rf"\b(?:the|a)\s+{_PERSON}\s+{_PERSON_TELLS}\b",
    rf"\b(?:did|does|do|has)\s+(?:the|a)\s+{_PERSON}\s+(?:say|mention|point|state|describe|note|explain|circle)",
    r"\b(?:it|this)\s+(?:is|was)\s+(?:also\s+)?(?:stated|mentioned|narrated|pointed\s+out)\s+that\b",
    needs="caption|transcri|narrat|remark|speaker|lecture|presenter|video|audio|recording|cursor|mouse|pointer|bounding"
    "|description|text|information|input|note|passage|prompt|mentioned|described|stated|specified|pointed|pathologist"
    "|expert|doctor|teacher|instructor",
)
"""The writer speaks of the text it was given."""

REFUSES = _any_of(
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model|text[- ]based model)\b",
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b",
    r"\bI (?:cannot|can't|can not|do not|don't) (?:actually )?(?:view|access|open|provide|assist|help)\b",
    r"\bI (?:cannot|can't|can not|do not|don't) (?:actually )?(?:see|have|have access to) (?:the|this|any|an) "
    r"(?:actual )?images?\b",
    r"\b(?:image|picture) (?:was|is|has) not (?:been )?(?:provided|given|attached|supplied|available)\b",
    needs="as a|sorry|able|cannot|can't| not|don't",
)
"""The writer speaks as a program that cannot see."""

COORDINATES = _any_of(
    r"[\[(]\s*-?\d*\.\d+\s*(?:,\s*-?\d*\.?\d+\s*){1,3}[\])]",
    r"[\[(]\s*\d+\s*%?(?:\s*,\s*\d+\s*%?){3}\s*[\])]",
    r"\b[xy][12]?\s*[=:≈~]\s*-?\d*\.?\d",
    r"\b[xy][- ](?:coordinates?|axis|position)\b|\bcoordinates?\b|\bnormali[sz]ed (?:position|location)s?\b",
    r"(?<![\d.])0?\.\d{1,3}\s*,\s*0?\.\d{1,3}(?![\d%])",
    needs="[|(|=|:|≈|~|,|coordinate|axis|position|location",
)

_WRITTEN_ON = (
    r"(?:label|sign|slide title|title|caption|watermark|logo|scale bar|stamp|annotation|overlay|heading|subtitle"
    r"|banner)"
)
TEXT_IN_IMAGE = _any_of(
    r"\b(?:what|which)\s+(?:text|words?|letters?|website|url|channel|logo|watermark|title|subtitle|email)\b",
    r"\bwhat\s+(?:is|are|was)\s+(?:the\s+)?(?:text|words?|number|name)\s+(?:on|in|at|shown|written|printed|displayed)\b",
    rf"\bwhat\s+(?:does|do|did)\s+(?:the\s+|this\s+)?(?:\w+\s+)?{_WRITTEN_ON}s?(?:\s+\w+){{0,4}}\s+(?:say|read|state)\b",
    r"\b(?:is|are|was)\s+(?:written|printed|typed|labell?ed)\s+(?:on|in|at|across|over|under|below|above)\b",
    r"\b(?:magnification|(?:case|slide|accession) number)\s+(?:is\s+)?(?:written|printed|displayed|on\s+the\s+label)",
    r"\b(?:read|see|make\s+out)\s+(?:the|any)\s+(?:text|words?|letters|writing|lettering)\b",
    rf"\bthe\s+(?!caption){_WRITTEN_ON}\s+(?:says|reads|states)\b|\breads?\s+the\s+(?:text|{_WRITTEN_ON})\b",
    needs="text|word|letter|website|url|channel|logo|watermark|title|email|number|name|label|sign|caption|scale|stamp"
    "|annotation|overlay|heading|banner|writ|print|typed|display",
)
"""Something written in the picture is asked for or told."""

SPEECH_NOISE = _any_of(
    r"\byou\s?tube\b|\bsubscri(?:be|bing|bers?)\b(?!\s+to\s+(?:the|this)\s+(?:view|theory|idea|classification))",
    r"\bthank(?:s| you)(?: (?:all|so much|very much|guys))? for (?:watching|listening|viewing|joining)\b",
    r"\b(?:see|catch) you (?:all |guys )?in the next (?:video|one|episode|lecture)\b|\bhit the (?:bell|like)\b",
    r"\blike and (?:share|subscribe|comment)\b|\blike (?:button|this video)\b",
    r"[\[(*♪]\s*(?:upbeat |soft |intro )?(?:music|applause|laughter)|♪",
    r"\bpatreon\b|\bsubtitles by\b|\bcaptions? by\b|\bamara\.org\b|\bwww\.\w|\bhttps?:",
    needs="tube|subscri|thank|next|hit the|like |music|applause|laughter|♪|patreon|subtitle|caption|amara|www.|http",
)
"""What speech recognition hears in silence, music and greetings."""

_MEANT_FOR_MODEL = (
    r"(?:instructions?|prompts?|directives?|guardrails"
    r"|your\s+(?:\w+\s+){0,2}?(?:commands?|rules|guidelines|training|programming))"
)
_MODEL = r"(?:ai|a\.i\.|assistant|model|bot|chatbot|agent|dan|gpt|llm|pirate|hacker|poet|translator|persona)"
INSTRUCTION = _any_of(
    r"(?<!not )(?<!n't )(?<!never )\b(?:ignore|disregard|forget|override|bypass|neglect|do not follow|don't follow"
    r"|stop following)\s+"
    rf"(?:\w+\s+){{0,4}}?{_MEANT_FOR_MODEL}\b(?!\s+(?:of|for|from)\s+(?:the\s+)?(?:manufacturer|kit|company|stain))",
    r"\b(?:ignore|disregard|forget)\s+(?:everything|all(?:\s+of)?|anything|what(?:ever)?)\s+(?:that\s+)?"
    r"(?:(?:was|is|came|you\s+were|you\s+have\s+been|i)\s+)?(?:said|told|above|before|prior|so far)\b"
    r"[^.]*\b(?:and|instead|now|reply|respond|answer|output|write|say)\b",
    r"\bpay no attention to (?:what|anything|everything|whatever) (?:you|i)\b",
    r"\b(?:note|message|instruction|memo)s? (?:to|for) (?:the|any|every|all|an?) "
    r"(?:ai|a\.i\.|model|llm|language model)s?\b",
    r"\byou are (?:now|no longer)\s+(?:going to (?:be|act)|acting)\b",
    rf"\byou are (?:now|no longer)\s+(?:an?|the|my)\s+(?:\w+\s+){{0,2}}?{_MODEL}\b",
    r"\byou are now (?:dan|chatgpt|gpt|unrestricted|in developer mode)\b",
    r"\b(?:act|behave|respond|pretend)\s+(?:as|like|to be|as if you (?:are|were))\s+(?:an?\s+)?(?:\w+\s+){0,2}"
    r"(?:ai|assistant|language model|chatbot|pirate|dan|unrestricted)\b",
    r"\bsystem\s+(?:prompt|message|instruction)s?\b|\bdeveloper mode\b|\bjailbr(?:eak|oken)\b|\bprompt injection\b",
    r"\bas an? (?:ai|large) language model\b",
    r"\b(?:print|reveal|repeat|show|output|leak|tell me)\s+(?:me\s+)?(?:your|the|all)\s+(?:\w+\s+)?(?:system\s+)?"
    r"(?:prompts?|instructions)\b",
    r"\b(?:reply|respond|answer|output)\s+(?:only\s+|just\s+|exactly\s+)*(?:with|in)\s+"
    r"(?:only\s+|just\s+|exactly\s+|the\s+(?:word|words|phrase|string|sentence)\b|json\b)",
    r"\b(?:output|print|return)\s+(?:only|exactly|nothing but|the following)\b",
    r"\bnew\s+(?:instructions?|task|system)\s*:",
    r"<\|?\s*/?\s*(?:im_start|im_end|system|user|assistant|endoftext|inst)\b|\[/?(?:inst|sys(?:tem)?)\]",
    r"###\s*(?:system|instruction|user|assistant)\b|\bend of (?:the )?(?:prompt|system message|instructions)\b",
    needs="ignore|disregard|forget|override|bypass|neglect|follow|attention|note|message|memo|inst|you are no|act"
    "|behave|respond|pretend|sys|developer|jailbr|prompt|language|reply|answer|output|print|return|task|<|#",
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
