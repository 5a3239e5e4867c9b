"""What a service's log tells against it. Pure: its standard error in, breaches out."""

import re

FAULT = re.compile(
    r"^(?:\S+ )?(?:ERROR|CRITICAL)\b.*|^Traceback .*|^\w*(?:Error|Exception)\b.*", re.MULTILINE
)


def faults(stderr: str) -> list[str]:
    """Its errors and tracebacks, a line of each."""
    return [found[0][:200] for found in FAULT.finditer(stderr)]
