"""The recipe of a run names no place that it was published in."""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments

from lora_plugins.recipe.reproduction.flags import LOCAL_FLAGS


def test_no_argument_that_names_a_place_to_publish_is_in_a_recipe() -> None:
    places = {item.name for item in fields(TrainingArguments) if item.name.startswith(("hub_", "push_", "trackio_"))}
    assert "hub_token" in places
    assert places <= LOCAL_FLAGS, f"private and not left out: {sorted(places - LOCAL_FLAGS)}"
