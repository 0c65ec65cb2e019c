"""Every template is whole, versioned and filled in one pass; schemas are bounded everywhere; editors are spoken to in their manner."""

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from rpo.curate.prompts.schemas import critique_schema, instructions_schema, one_call_schema
from rpo.curate.prompts.templates import filled, messages, template, templates_hash
from rpo.curate.prompts.wording import REQUEST_MAX, WORDINGS, edit_request

NAMES = sorted(path.name.removesuffix(".txt") for path in files("rpo.curate.prompts").joinpath("templates").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_each_template_is_read_without_its_title(name: str) -> None:
    assert template(name) and not template(name).startswith("#") and len(templates_hash(name)) == 16


def test_every_wording_has_its_template() -> None:
    assert {wording.template for wording in WORDINGS.values()} <= set(NAMES)


def test_places_are_filled_in_one_pass() -> None:
    assert filled("{{a}} and {{b}}", {"a": "{{b}}", "b": "x"}) == "{{b}} and x"
    with pytest.raises(KeyError):
        filled("{{a}}", {})
    system, user = messages("critique_structured", {"prompt": '"{{image}}"'}, np.zeros((1, 1, 3), dtype=np.uint8))
    assert [type(part) for part in user.parts] == [str, np.ndarray, str] and '"{{image}}"' in str(user.parts[0])


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from nodes(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from nodes(value)


@pytest.mark.parametrize(
    "schema", [critique_schema(), instructions_schema(2), one_call_schema(1)], ids=["critique", "instructions", "both"]
)
def test_schemas_bound_everything_and_leave_nothing_open(schema: dict[str, Any]) -> None:
    found = list(nodes(schema))
    for node in found:
        assert not node.keys() & {"$ref", "$defs", "default", "title"} or node.get("type") is None
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node
        if node.get("type") == "array":
            assert "maxItems" in node
        if node.get("type") == "object":
            assert node["additionalProperties"] is False and node["required"] == list(node["properties"])
    assert not any("$ref" in node for node in found)


def test_fields_that_we_fill_in_are_not_asked_for() -> None:
    assert not {"agreement", "instructions"} & critique_schema()["properties"].keys()


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
