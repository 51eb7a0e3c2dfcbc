"""What is said of captions and of the trigger word before a run trains."""

from dataclasses import replace

import pytest

from trainers.config import DreamBoothConfig
from trainers.data.caption_checks import WordTokens, check_captions, check_tokens
from trainers.data.caption_variants import Wording
from trainers.data.intake import Intake
from trainers.data.pictures import Picture


def said(captions, **keys):
    """The notes, and those of them that are warnings, of pictures with these captions."""
    validation = keys.pop("validation", {})
    config = DreamBoothConfig(data=keys, validation=validation)
    wording, pictures = Wording.from_config(config.data), []
    for i, texts in enumerate(captions):
        first, *others = [texts] if isinstance(texts, str) else texts
        picture = Picture(f"/photos/{i}.png", bytes, first, wording=wording)
        pictures.append(replace(picture, other_captions=tuple(others)))
    intake = Intake()
    check_captions(intake, pictures, config)
    warnings = [note.text for note in intake.notes if note.level == "warning"]
    return "\n".join(note.text for note in intake.notes), "\n".join(warnings)


def test_plain_captions_are_not_worth_a_word():
    assert said(["a sks dog", "a dog", "a dog"]) == ("", "")
    assert said(["a sks dog", "SKS, grass"], trigger="sks") == ("", "")


def test_captions_without_the_trigger_are_counted_and_named():
    captions = ["a sks dog", "a dog", ["sks", "a pet"], "risks"]
    _, warnings = said(captions, trigger="sks")
    assert "3 of 4 pictures have a caption without the trigger 'sks': 1.png, 2.png, 3.png" in (
        warnings
    )


def test_a_trigger_that_nothing_teaches_is_told_with_what_to_do():
    _, warnings = said(["a dog", "a pet"], trigger="sks")
    assert "no caption has the trigger 'sks', so nothing teaches it: write {trigger}" in warnings
    assert "of 2 pictures" not in warnings


def test_a_trigger_in_the_class_prompt_is_a_warning_and_none_in_the_samples_a_note():
    keys = {"trigger": "sks", "class_prompt": ["a dog", "a sks dog"], "num_class_images": 2}
    notes, warnings = said(["sks"], **keys, validation={"prompts": ["a dog"]})
    assert "data.class_prompt has the trigger 'sks'" in warnings
    assert "no prompt of validation.prompts has the trigger" in notes
    assert "validation" not in warnings
    notes, _ = said(["sks"], trigger="sks", validation={"prompts": ["a dog", "a Sks dog"]})
    assert notes == ""


def test_texts_are_counted_and_many_are_told_what_they_cost():
    notes, warnings = said([["a, b", "one"], "a, b"], shuffle_tags=True)
    assert "1 pictures have several captions: each visit draws one" in notes
    assert "2 captions become 3 texts by shuffled or dropped tags" in notes
    assert warnings == ""
    many = [f"{i}, b, c, d, e, f, g" for i in range(30)]
    notes, _ = said(many, shuffle_tags=True, caption_variants=100)
    assert "30 captions become 2" in notes
    assert "fewer data.caption_variants need less time and disk" in notes


def test_captions_without_tags_are_told_where_tags_are_to_move():
    notes, warnings = said(["a, b", "a dog"], tag_dropout=0.5)
    assert "have no tags to shuffle or drop: 1.png" in notes
    assert warnings == ""
    assert "no caption has a comma" in said(["a dog", "a pet"], shuffle_tags=True)[1]


class Splits:
    """Text encoders that split any word so."""

    def __init__(self, **tokens):
        self.tokens, self.text_encoder_names = tokens, list(tokens)

    def split_word(self, name, word):
        return self.tokens[name]


def tokens_said(trigger, **tokens):
    intake = Intake()
    check_tokens(intake, Splits(**tokens), trigger)
    by_level = {"note": [], "warning": []}
    for note in intake.notes:
        by_level[note.level].append(note.text)
    return by_level["note"], by_level["warning"]


def test_the_tokens_are_told_once_for_all_that_split_alike():
    one = WordTokens(("sks",), place=0.97, nearest=("rifle", "gun"))
    notes, warnings = tokens_said("sks", a=one, b=one, t5=WordTokens(("s", "ks")))
    assert notes == [
        "the trigger 'sks' is one token of a and b, most like rifle, gun",
        "the trigger 'sks' is 2 tokens (s ks) of t5",
    ]
    assert warnings == []


@pytest.mark.parametrize(
    ("trigger", "tokens", "words"),
    [
        ("ohwx42", WordTokens(("ohwx", "4", "2")), "digits of the trigger 'ohwx42'"),
        ("42", WordTokens(("4", "2")), None),
        ("rex", WordTokens(("rex",), place=0.22), "among the 22% most frequent"),
        ("sks", WordTokens(("sks",), place=0.81), None),
        ("犬", WordTokens(("?",), has_unknown=True), "reads them as unknown"),
    ],
)
def test_what_makes_a_trigger_hard_to_learn_is_a_warning(trigger, tokens, words):
    _, warnings = tokens_said(trigger, a=tokens)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]
