"""Keeps gpt-worker's webhooks in a directory: flask --app receiver run --port 8000"""

import os
from pathlib import Path

from flask import Flask, request
from standardwebhooks import Webhook, WebhookVerificationError

app = Flask(__name__)
webhook = Webhook(os.environ["WEBHOOK_SECRET"])
inbox = Path(os.environ.get("INBOX", "inbox"))
inbox.mkdir(exist_ok=True)


@app.post("/hook")
def receive() -> tuple[str, int]:
    body = request.get_data()
    try:
        webhook.verify(body, dict(request.headers))
    except (WebhookVerificationError, ValueError):
        return "", 401
    # The id is the same on every attempt: a message that comes twice is kept once.
    (inbox / f"{request.headers['webhook-id']}.json").write_bytes(body)
    return "", 204
