from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from medllava.errors import DataError
from medllava.instruct_gen.concepts import Concept, Vocabulary, vote

SHIPPED = Path(__file__).parents[2] / "instruct_gen" / "vocabulary" / "histopathology.tsv"


@pytest.fixture(scope="module")
def shipped() -> Vocabulary:
    return Vocabulary.read(SHIPPED)


def terms(vocabulary: Vocabulary, text: str) -> list[str]:
    return [mention.concept.term for mention in vocabulary.link(text)]


def test_the_longest_match_of_whole_words_wins(shipped):
    text = "Here a squamous cell carcinoma with keratin pearls; glandular cells, and some Reed Sternberg cells."
    mentions = shipped.link(text)
    assert [(mention.concept.term, text[mention.start : mention.end]) for mention in mentions] == [
        ("squamous cell carcinoma", "squamous cell carcinoma"), ("keratin pearl", "keratin pearls"),
        ("Reed-Sternberg cell", "Reed Sternberg cells"),
    ]
    assert terms(shipped, "the fathead minnow, England, glandless") == []


@pytest.mark.parametrize(
    ("said", "term"),
    [
        ("nuclei", "nucleus"), ("METASTASES", "metastasis"), ("Hodgkin's lymphoma", "Hodgkin lymphoma"),
        ("Crohn’s disease", "Crohn disease"), ("Ki 67", "Ki-67"), ("psammoma bodies", "psammoma body"),
        ("H. pylori", "Helicobacter pylori"), ("tumour budding", "tumor budding"), ("a FNA", "fine needle aspirate"),
    ],
)
def test_number_case_spelling(shipped, said, term):
    assert terms(shipped, f"we see {said} here") == [term]


def test_abbreviations_are_written_in_capitals(shipped):
    assert terms(shipped, "put a pin here") == []
    assert terms(shipped, "high grade PIN here") == ["prostatic intraepithelial neoplasia"]


def test_the_vocabulary_that_comes_along(shipped):
    assert len(shipped.concepts) >= 250
    places = Counter(concept.sub_pathology for concept in shipped.concepts)
    assert {
        "Bone", "Breast", "Cytopathology", "Dermatopathology", "Endocrine", "Gastrointestinal", "Genitourinary",
        "Gynecologic", "Head and neck", "Hematopathology", "Neuropathology", "Pulmonary", "Renal", "Soft tissue",
    } <= places.keys()
    names = [name.lower() for concept in shipped.concepts for name in (concept.term, *concept.synonyms)]
    assert len(names) == len(set(names))
    assert {"Hodgkin", "Gleason", "Paget", "Barrett", "Wilms", "Ewing", "Kaposi", "Crohn"} <= shipped.eponyms


def test_the_sub_pathology_has_most_votes(shipped):
    assert vote(shipped.link("A glomerulus with crescents, a podocyte, and one osteoclast in the stroma.")) == "Renal"
    assert vote(shipped.link("A gland with necrosis.")) is None
    assert vote(shipped.link("glomerulus, osteoclast")) == "Bone"


def test_faults_of_a_file_are_named(tmp_path):
    path = tmp_path / "own.tsv"
    with pytest.raises(DataError, match=r"own\.tsv: cannot be read"):
        Vocabulary.read(path)
    for text, message in (
        ("term\tid\n", r"own\.tsv:1: expected the columns term, id, synonyms"),
        ("term\tid\tsynonyms\ttype\tsub_pathology\ngland\tC1\n", r"own\.tsv:2: expected 5 columns"),
        ("term\tid\tsynonyms\ttype\tsub_pathology\na\tC1\t\t\t\nb\tC1\t\t\t\n", r"own\.tsv:3: the id 'C1' occurs"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Vocabulary.read(path)
    path.write_text("term\tid\tsynonyms\ttype\tsub_pathology\ngland\tC0225358\tacinus; acini\ttissue\t\n")
    assert Vocabulary.read(path).concepts == (Concept("C0225358", "gland", ("acinus", "acini"), "tissue", None),)
