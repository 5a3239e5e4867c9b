"""How a prompt is stored, and what it counts for in memory."""

import json
import tracemalloc

import pytest

from gpt_worker.domain import EncodedPrompt, Prompt
from gpt_worker.prompts import BYTES_PER_TOKEN, encode, weigh

VALUES = 20_000
SHAPES = {
    "empty lists": "[]",
    "empty objects": "{}",
    "deep lists": "[" * 100 + "]" * 100,
    "deep objects": '{"a":' * 100 + "0" + "}" * 100,
    "objects": '{"a":0}',
    "numbers": "1e9",
    "large numbers": "9" * 30,
    "texts": '"ab"',
    "messages": '{"role":"user","content":"How are you?"}',
}


@pytest.mark.parametrize(
    ("prompt", "encoded"),
    [
        ('say "ü"', '"say \\"ü\\""'),
        ([{"role": "user", "content": "ü"}], '[{"role":"user","content":"ü"}]'),
        ({"n": 1.5}, '{"n":1.5}'),
        (EncodedPrompt('{"n":1.5}'), '{"n":1.5}'),
    ],
)
def test_prompt_is_json_without_spaces(prompt: Prompt | EncodedPrompt, encoded: str) -> None:
    assert encode(prompt) == encoded


@pytest.mark.parametrize(
    "prompt", ["a" * 4000, "[{,}]" * 800, [{"role": "user", "content": "Good morning, my friend! " * 160}]]
)
def test_ordinary_prompt_weighs_its_tokens(prompt: Prompt) -> None:
    assert weigh(encode(prompt), 1000) == 1000


@pytest.mark.parametrize("value", SHAPES.values(), ids=SHAPES)
def test_odd_prompt_weighs_what_its_objects_take(value: str) -> None:
    encoded = f"[{','.join([value] * (VALUES * 2 // len(value)))}]"

    tracemalloc.start()
    objects = json.loads(encoded)
    taken_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert objects
    assert weigh(encoded, 1) * BYTES_PER_TOKEN >= taken_bytes / 2
