"""Every template is whole, versioned, filled in one pass, and shows no answer that could be copied; editors have their wording."""

import re
from functools import partial
from importlib.resources import files

import numpy as np
import pytest

from rpo.curation.vlm.critic import instruction_words
from rpo.curation.vlm.editor_style import REQUEST_MAX, WORDINGS, edit_request
from rpo.curation.vlm.parse import read_critique, read_one_call
from rpo.curation.vlm.templates import filled, messages, placeholders, template, templates_hash

NAMES = sorted(path.name.removesuffix(".txt") for path in files("rpo.curation.vlm").joinpath("templates").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_each_template_is_read_without_its_title(name: str) -> None:
    assert template(name) and not template(name).startswith("#") and len(templates_hash(name)) == 16


def test_every_wording_has_its_template() -> None:
    assert {wording.template for wording in WORDINGS.values()} <= set(NAMES)


def test_places_are_filled_in_one_pass() -> None:
    assert filled("{{a}} and {{b}}", {"a": "{{b}}", "b": "x"}) == "{{b}} and x"
    with pytest.raises(KeyError):
        filled("{{a}}", {})
    _system, user = messages("critique_structured", {"prompt": '"{{image}}"'}, np.zeros((1, 1, 3), dtype=np.uint8))
    assert [type(part) for part in user.parts] == [str, np.ndarray, str] and '"{{image}}"' in str(user.parts[0])


def test_the_forms_shown_cannot_be_copied() -> None:
    """A model that copies the example of a template answers no JSON, a placeholder or an example, which is refused."""
    shown = {"critique_structured": read_critique, "critique_one_call": partial(read_one_call, max_instructions=3, max_words=25)}
    for name, read in shown.items():
        (form,) = [line for line in filled(template(name), instruction_words("ip2p", 3) | {"prompt": "", "image": ""}).splitlines()
                   if line.startswith("{")]  # fmt: skip
        with pytest.raises(ValueError, match="not one JSON object"):
            read(form)
        values = re.sub(r"(?<=[ \[])<[^<>]*>", "1", form)
        with pytest.raises(ValueError, match="still holds <"):
            read(values)
    assert {"<thing>", "<what is seen>"} <= set(placeholders())


def test_addresses_are_asked_for_where_there_are_issues() -> None:
    some, none = instruction_words("ip2p", 3, 4), instruction_words("ip2p", 3, 0)
    assert "from 0 to 3" in some["instructions_format"] and '"addresses": [<index>]' in some["example"]
    assert not any("addresses" in words or "{{" in words for words in none.values())


def test_editors_are_spoken_to_in_their_manner() -> None:
    changes, keep = ["make the star red", "remove the hat."], ["the sofa", "the light"]
    assert edit_request(changes[:1], keep, "ip2p") == "make the star red"
    assert edit_request(changes, keep, "ip2p") == "make the star red and remove the hat."
    told = edit_request(changes, keep, "kontext")
    assert told == "Make the star red. Remove the hat. Keep everything else exactly the same: the sofa, the light."
    assert edit_request(changes[:1], [], "qwen") == "Make the star red. Keep everything else exactly the same."
    assert edit_request(changes[:1], [], "klein").endswith("Do not change style, lighting, sharpness or framing.")
    assert edit_request([], keep, "kontext") == ""


def test_a_request_stays_short_by_what_is_kept_and_holds_words_only() -> None:
    told = edit_request(["x" * 300] * 3, ["{0.__class__} " + "k" * 290] * 8, "kontext")
    assert len(told) < REQUEST_MAX + 100 and told.count("{0.__class__}") == 1
