"""Where the HTTP face finds the service."""

from flask import current_app

from gpt_worker.service import Service


def service() -> Service:
    """The parts of the service that this app belongs to."""
    found: Service = current_app.extensions["gpt_worker"]
    return found
