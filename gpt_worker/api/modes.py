"""The service's modes over HTTP."""

from typing import Any

from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from gpt_worker.api import schemas
from gpt_worker.api.context import service
from gpt_worker.domain import Modes

Json = dict[str, Any]

api = APIBlueprint("modes", __name__, abp_tags=[Tag(name="modes", description="The service's toggles")])


@api.get(
    "/settings",
    summary="The modes",
    description="How jobs are delivered, who may register, and whether a token is asked for.",
    responses={200: schemas.answer("The modes", schemas.SettingsReply)},
)
def get_settings() -> Json:
    return _render(service().modes.current())


@api.patch(
    "/settings",
    summary="Change modes (admin)",
    description="Takes effect at once and outlives a restart; what is left out stays as it is.",
    responses={
        200: schemas.answer("All modes as they are now", schemas.SettingsReply),
        **schemas.problems(507, *schemas.BODY_PROBLEMS),
    },
)
def change_settings(body: schemas.SettingsPatchBody) -> Json:
    return _render(service().modes.change(body.delivery, body.registration, body.auth))


def _render(modes: Modes) -> Json:
    return {"delivery": modes.delivery.value, "registration": modes.registration, "auth": modes.auth}
