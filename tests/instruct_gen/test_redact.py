"""Twenty sentences of each kind of thing that tells who somebody is, and terms that only look like names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from medllava.errors import ConfigError
from medllava.instruct_gen.concepts import Vocabulary
from medllava.instruct_gen.endpoint import add_flags, read_captions, tell_redactions
from medllava.instruct_gen.redact import Redactor

pytest.importorskip("presidio_analyzer")
VOCABULARY = Path(__file__).parents[2] / "instruct_gen" / "vocabulary" / "histopathology.tsv"

SECRETS = {
    ("name", "[NAME]"): (
        "Hello, my name is Sarah Johnson and I am a pathologist.",
        "This case was sent to me by Dr. Patel.",
        "Thanks to Professor Michael O'Brien for these slides.",
        "Mr. Thompson presented with a lump.",
        "doctor smith asked me about this gland",
        "my name is kevin brown and this is a colon biopsy",
        "The patient, Maria Gonzalez, was treated with chemotherapy.",
        "I discussed it with Jennifer yesterday.",
        "Mrs. van der Berg had a biopsy of the breast.",
        "This slide is courtesy of Anna Kowalski.",
        "Hi, I'm David.",
        "Dr. Barrett showed me a case of Barrett esophagus.",
        "Our resident James Lee cut this section.",
        "Nurse Robinson brought the specimen.",
        "As Dr. A. B. Miller pointed out, this is necrosis.",
        "Emily's biopsy shows a psammoma body.",
        "A woman named Patricia came with a thyroid nodule.",
        "Professor Schmidt and Dr. Wang agree on adenocarcinoma.",
        "Look here, says Christopher Davis, at the keratin pearl.",
        "Let me thank Robert Wilson for this Hodgkin lymphoma.",
    ),
    ("name2", "[NAME]"): (
        "I am Dr. Rajesh Kumar from Mumbai.",
        "Welcome, my name is Xiaoming Zhang.",
        "Case shared by Dr. Nguyen and Dr. Okafor.",
        "thank you doctor lee for the question",
        "Thanks, Karen.",
        "As Susan said, this is a lipoma.",
        "Ask William Taylor about it.",
        "This is Mr. Garcia's lung.",
        "Let us ask Prof. Müller.",
        "The slide was scanned by Daniel.",
        "hi i'm jessica and today we look at kidney",
        "Miss Amanda Clark had a fibroadenoma.",
        "I learned this from Juan Rosai himself.",
        "Dr. Ackerman's book says so.",
        "Peter, can you focus?",
        "It was Elizabeth who saw it first.",
        "Dr. de Souza cut it.",
        "signed by Olga Ivanova",
        "my patient John had melanoma",
        "Thomas and Linda discussed it.",
    ),
    ("date", "[DATE]"): (
        "The biopsy was taken on March 3rd, 2019.",
        "She came back on 12/05/2021.",
        "It was signed out on 2020-03-17.",
        "The surgery on the 4th of July 2018 was long.",
        "In January 2017 she had a mass.",
        "He was born on May 5, 1964.",
        "We saw it on the twenty-first of October.",
        "On 3.11.2016 the second biopsy came.",
        "Follow up was on Sept 9th.",
        "Received on November 30, 2022 in formalin.",
        "It was 1/2/99 when it began.",
        "By December of 2015 it had grown.",
        "Her visit on the second of February showed it.",
        "Seen again on 17 August 2014.",
        "He died on June 1st.",
        "The date is 2021-12-01.",
        "On April 14th, 2010, a lobectomy was done.",
        "This came in on the 30th of September, 2013.",
        "Imaging from 07/08/2009 shows it.",
        "Excised on February 28th.",
    ),
    ("phone", "[PHONE]"): (
        "Call me at 212-555-0173.",
        "My number is (415) 555-2671.",
        "Phone +1 650 253 0000 for the slides.",
        "You can reach us at 617.555.0123.",
        "Ring +44 20 7946 0958.",
        "The lab is at 303-555-0188.",
        "Call 1-800-555-0199 now.",
        "Text 917 555 0142 if lost.",
        "Dial +49 30 901820.",
        "The office, 702-555-0111, is open.",
        "Fax it to 312-555-0155.",
        "Her number was 202-555-0143.",
        "Ask at (212) 555-0100.",
        "It is +1-415-555-0132.",
        "Page me on 646-555-0119.",
        "Mobile 323-555-0177 please.",
        "Our line is 505-555-0166.",
        "Contact 214.555.0189.",
        "Reach them: +1 (305) 555-0122.",
        "Call 713-555-0110 today.",
    ),
    ("email", "[EMAIL]"): (
        "Write to jane.doe@example.org.",
        "Mail me: path-lab@hospital.edu.",
        "It is a.b+c@mail.example.co.uk.",
        "Send it to info@clinic.de please.",
        "john dot smith at gmail dot com is my address",
        "Ask k_lee@uni-lab.org.",
        "My address is sara at hospital dot edu",
        "reach us at slides@archive.net",
        "To dr.who@tardis.gov, then.",
        "Use x1@y2.com",
        "Email bob@example.com or mary@example.com.",
        "the mail is anna underscore k at uni dot de",
        "cc: team-7@lab.example.org",
        "Try p.q@r.st",
        "From sender@host.example",
        "write to first.last@sub.domain.org",
        "see me@me.me",
        "Contact admin@pathology.ca",
        "Get it from the.desk@museum.org",
        "Say hi at hello@world.io",
    ),
    ("record", "[NUMBER]"): (
        "MRN 12345678 is the patient.",
        "The accession number is S19-12345.",
        "Medical record number 00-445-77.",
        "This is SP21-004512 from last year.",
        "patient ID A123456",
        "Her social security number is 123-45-6789.",
        "Specimen number 20-3345.",
        "Look at S20 4456 again.",
        "Chart number 778812.",
        "record number: 99812",
        "It is labelled B18-00234.",
        "hospital number H334455",
        "accession US22-1190",
        "MRN: 4455-66",
        "The insurance number 8812345 is on it.",
        "specimen id 44-A12",
        "chart no. 12-9981",
        "M.R.N. 556677",
        "case S17-9982 is next",
        "Accession no. 2019-44512",
    ),
}

TERMS = (
    "This is Hodgkin lymphoma with Reed-Sternberg cells.",
    "Barrett esophagus with goblet cells.",
    "Paget disease of the nipple, see the Paget cells.",
    "Gleason pattern four, Gleason score eight.",
    "Ki-67 is twenty percent, CD20 positive.",
    "Wilms tumor with blastema.",
    "Ewing sarcoma and Kaposi sarcoma.",
    "Crohn's disease with granulomas.",
    "Hashimoto thyroiditis next to Graves disease.",
    "Merkel cell carcinoma of the skin.",
    "Here is a Brenner tumor and a Krukenberg tumor.",
    "Call-Exner bodies and Schiller-Duval bodies.",
    "This is Warthin tumor.",
    "There are two glands at 10 o'clock, in the upper left.",
    "Verocay bodies in Antoni A areas.",
    "Homer Wright rosettes of a medulloblastoma.",
    "Clara cells and Paneth cells, Brunner glands.",
    "Burkitt lymphoma with a starry sky pattern.",
    "May I show you the Rosenthal fibers?",
    "Will you look at the Touton giant cell, about 20 by 30 microns?",
    "This is Paget's.",
    "Mark the margin here. Rose colored stroma.",
    "Charcot-Leyden crystals, Curschmann spirals.",
    "Wilson disease and Gaucher cells.",
    "Case 7, slide 3: 400 times magnification.",
    "The mitotic count is 12 per 10 high power fields.",
    "The Masson trichrome and the Gram stain.",
    "In 2019 the WHO changed it.",
    "It is T2 N1 M0, HER2 3 plus.",
    "Grade 2 by Nottingham, Bloom-Richardson 7.",
    "Thank you. Next we see more glands.",
    "Hello everyone, welcome back.",
    "This is High Grade dysplasia.",
    "I'm going to show you a lymph node.",
    "Thanks for watching, see you next week.",
    "This is called Comedo necrosis.",
    "Hi guys, this is a Skin biopsy.",
    "June bugs are not here. The Park is.",
    "You may see Goodpasture or Alport syndrome.",
    "Look at the Auer rods in this blast.",
    "This is from the American Journal of Pathology.",
    "Welcome to New York, at Mount Sinai.",
    "The Bethesda system, category four.",
    "Type Two pneumocytes line the alveoli.",
    "Let me go to high power, forty times.",
    "The ratio is 3 to 1.",
    "About 15 mitoses per 2 square millimeters.",
    "There are 1, 2, 3, 4, 5 glands.",
    "Hassall's corpuscles of the thymus.",
    "Sjögren syndrome of the parotid.",
    "This is Castleman disease, and Rosai-Dorfman disease.",
    "H and E stain, PAS and Giemsa.",
    "Von Brunn nests below the urothelium.",
    "In Lynch syndrome you see this. Cowden too.",
    "Fuhrman grade 3, Breslow 2.1 millimeters, Clark level four.",
)

SURVIVORS = re.compile(
    "Johnson|Patel|Brien|Thompson|smith|brown|Gonzalez|Jennifer|Berg|Kowalski|David|James|Lee|Robinson|Miller|Emily"
    "|Patricia|Schmidt|Wang|Davis|Wilson|Kumar|Zhang|Nguyen|Okafor|lee|Karen|Susan|Taylor|Garcia|Müller|Daniel|jessica"
    "|Clark|Rosai|Ackerman|Peter|Elizabeth|Souza|Ivanova|John|Linda|Barrett showed"
)


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(Vocabulary.read(VOCABULARY))


@pytest.mark.parametrize(("kind", "label"), SECRETS, ids=lambda value: value.strip("[]"))
def test_what_tells_who_somebody_is_goes(redactor, kind, label):
    sentences = SECRETS[kind, label]
    assert len(sentences) == 20
    for sentence in sentences:
        redacted = redactor.redact(sentence)
        assert label in redacted, redacted
        if label == "[NAME]":
            assert not SURVIVORS.search(redacted), redacted
        else:
            assert not re.search(r"\d{2}", redacted), redacted


@pytest.mark.parametrize("sentence", TERMS)
def test_terms_stay(redactor, sentence):
    assert redactor.redact(sentence) == sentence


def test_a_person_with_an_eponym_for_a_name(redactor):
    said = "Dr. Hodgkin and Dr. Paget saw Hodgkin lymphoma."
    assert redactor.redact(said) == "Dr. [NAME] and Dr. [NAME] saw Hodgkin lymphoma."


def test_a_spacy_model_finds_more(tmp_path):
    import spacy

    model = spacy.blank("en")
    model.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Xiomara"}])
    model.add_pipe("sentencizer")
    model.to_disk(tmp_path / "model")
    vocabulary = Vocabulary.read(VOCABULARY)
    said = "Then Xiomara stained it for CD20."
    assert Redactor(vocabulary).redact(said) == said
    assert Redactor(vocabulary, str(tmp_path / "model")).redact(said) == "Then [NAME] stained it for CD20."
    with pytest.raises(ConfigError, match="--redact-model nowhere: no such spaCy model"):
        Redactor(vocabulary, "nowhere")


def test_captions_are_redacted_on_their_way_and_counted(tmp_path, capsys):
    import argparse

    from medllava.instruct_gen.recipe import GenerateRecipe

    rows = [
        {
            "id": f"talk-{number:03d}", "video": "talk.mp4", "image": "a.png", "crop_px": [0, 0, 9, 9],
            "phrases": [{"text": text, "start_s": 1.0, "end_s": 2.0, "box": [0.1, 0.1, 0.4, 0.5]}],
        }
        for number, text in enumerate(["Dr. Patel saw this gland.", "A gland.", "Mary came on May 5, 2020."])
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parser = argparse.ArgumentParser()
    add_flags(parser)
    common = ["--captions", str(path), "--out", str(tmp_path), "--config", "x", "--vocabulary", str(VOCABULARY)]
    recipe = GenerateRecipe.model_validate({"model": "m", "prompts": "p", "kinds": {"caption": {}}})
    plain = list(read_captions(parser.parse_args(common), recipe))
    captions = read_captions(parser.parse_args([*common, "--redact"]), recipe)
    redacted = list(captions)
    assert [caption.phrases[0].text for caption in redacted] == [
        "Dr. [NAME] saw this gland.", "A gland.", "[NAME] came on [DATE]."
    ]
    assert captions.of_video("talk.mp4") == redacted
    for before, after in zip(plain, redacted, strict=True):
        assert before.id == after.id
        assert before.phrases[0].box == after.phrases[0].box
    tell_redactions(captions)
    assert capsys.readouterr().out == "redacted: 2 [NAME], 1 [DATE]\n"
