"""A prompt as it is stored, JSON, and how much of the memory it takes as objects. Pure."""

import json
from json.encoder import encode_basestring

from gpt_worker.domain import EncodedPrompt, Prompt

BYTES_PER_TOKEN = 32  # of memory: eight times the text, which all but odd JSON stays below
BYTES_PER_VALUE = 128  # of a list, an object, or what stands behind a comma; measured on Python 3.11

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(prompt: Prompt | EncodedPrompt) -> str:
    """The JSON of a prompt."""
    if isinstance(prompt, str):
        return encode_basestring(prompt)
    return prompt.json if isinstance(prompt, EncodedPrompt) else _encode(prompt)


def weigh(encoded: str, tokens: int) -> int:
    """What a stored prompt of so many tokens counts for where it is in memory: its tokens, or more if it takes more.

    A megabyte of empty lists is 25 to 50 megabytes of objects. Brackets and commas are counted, those in texts too,
    which is done at once and too much rather than too little.
    """
    size_bytes = len(encoded)
    if encoded[0] != '"':
        values = encoded.count(",") + encoded.count("[") + encoded.count("{")
        size_bytes += BYTES_PER_VALUE * values
    return max(tokens, size_bytes // BYTES_PER_TOKEN)
