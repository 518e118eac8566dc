"""What processes of an engine are made of, for tests without SGLang."""

import logging
import time


class Ports:
    """As SGLang's argument that tells an engine's processes their sockets."""

    instance_id = "abcdef"


def fail(ports: Ports, seconds: float) -> None:
    """Logs an error as SGLang does, and ends after `seconds`."""
    logging.getLogger("sglang.somewhere").error("first\nValueError: the reason")
    time.sleep(seconds)
