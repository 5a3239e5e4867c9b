"""Hands texts to gpt-worker and does not wait: the answers come to the webhook receiver."""

import os

import requests

URL = os.environ["GPT_WORKER_URL"]
TOKEN = os.environ["GPT_WORKER_TOKEN"]


def submit(order: str, texts: dict[str, str]) -> str:
    """The job's id. Call it again with the same order when it raises: there will be one job all the same."""
    reply = requests.post(
        f"{URL}/jobs",
        headers={"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": f"order-{order}"},
        json={
            "data": texts,
            "settings": {"delivery": "webhook", "template": "Translate to French: {text}"},
            "metadata": {"order": order},
        },
        timeout=60,
    )
    reply.raise_for_status()
    return str(reply.json()["id"])
