"""Requests that work, as the documentation shows them; a test sends every one to the real service."""

from typing import Any

Json = dict[str, Any]

JOBS: dict[str, Json] = {
    "texts by id": {
        "summary": "Texts, each under an id of one's own",
        "value": {
            "data": {"capital": "What is the capital of France?", "greeting": "Say hello."},
            "settings": {"instructions": "Answer in English.", "max_output_tokens": 40},
            "metadata": {"batch": "42"},
        },
    },
    "template": {
        "summary": "One template, and the variables of each task",
        "value": {
            "data": [
                {"id": "morning", "vars": {"lang": "French", "text": "good morning"}},
                {"id": "night", "vars": {"lang": "Italian", "text": "good night"}},
            ],
            "settings": {"template": "Translate to {lang}: {text}", "max_output_tokens": 40},
        },
    },
    "messages": {
        "summary": "Messages in OpenAI's form",
        "value": {
            "data": {
                "review": {
                    "messages": [
                        {"role": "system", "content": "You are a friendly critic."},
                        {"role": "user", "content": "What makes a good novel?"},
                    ]
                }
            },
            "settings": {"max_output_tokens": 40},
        },
    },
    "json schema": {
        "summary": "Answers by a JSON schema",
        "value": {
            "data": ["The food was cold, but the waiter was kind."],
            "settings": {
                "instructions": "Classify the review.",
                "max_output_tokens": 40,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "verdict",
                        "strict": True,
                        "schema": {
                            "type": "object",
                            "properties": {"mood": {"type": "string", "enum": ["good", "mixed", "bad"]}},
                            "required": ["mood"],
                            "additionalProperties": False,
                        },
                    },
                },
            },
        },
    },
    "old names": {
        "summary": "As the old worker took it",
        "value": {
            "data": {"greet": "Translate to French: good morning", "bye": "Translate to French: good night"},
            "settings": {"maxTokenCount": 4000, "temperature": 1},
        },
    },
}
JSONL = """{"id": "capital", "text": "What is the capital of France?"}
{"id": "greeting", "messages": [{"role": "user", "content": "Say hello."}]}
"""
CSV = """id,text
capital,What is the capital of France?
greeting,Say hello.
"""
FORM: Json = {
    "settings": {"template": "Answer in one word: {text}", "max_output_tokens": 40},
    "metadata": {"batch": "42"},
    "file": CSV,
}

RESULTS_JSON: Json = {
    "results": {"capital": "Paris", "greeting": None},
    "errors": {"greeting": {"code": "timeout", "message": "The call took longer than 300 s.", "attempts": 4}},
}
RESULTS_JSONL = """{"id":"capital","result":"Paris","error":null,"finish_reason":"stop"}
{"id":"greeting","result":null,"error":{"code":"timeout","message":"…","attempts":4},"finish_reason":null}
"""
RESULTS_CSV = """id,result,error_code,finish_reason
capital,Paris,,stop
greeting,,timeout,
"""
