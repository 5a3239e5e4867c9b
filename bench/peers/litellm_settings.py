"""How LiteLLM is set, alike for the Router and the proxy, so that nothing but the way to it differs."""

import peer

RETRIES = 8
COOLDOWN_S = 5


def deployments(told: peer.Told) -> list[dict[str, object]]:
    """One deployment a key, under one name; with `rpm` it is chosen as often as its limit is large."""
    listed = []
    for key in told.keys:
        params = {
            "model": f"openai/{told.model}",
            "api_key": key["api_key"],
            "api_base": told.base_url,
            "timeout": told.deadline_s,
            "max_retries": 0,
        }
        if key["requests_per_minute"]:
            params["rpm"] = key["requests_per_minute"]
        listed.append({"model_name": told.model, "litellm_params": params})
    return listed


def router_settings(told: peer.Told) -> dict[str, object]:
    return {
        "routing_strategy": told.options.get("routing_strategy", "simple-shuffle"),
        "num_retries": RETRIES,
        "cooldown_time": COOLDOWN_S,
        "timeout": told.deadline_s,
    }
