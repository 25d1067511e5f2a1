"""Whether the Hugging Face Hub can be asked, found out in seconds: its client retries for half a minute. No torch."""

from __future__ import annotations

import functools
import http.client
import ssl
import urllib.error
import urllib.request

TIMEOUT = 5.0  # seconds


def away() -> str:
    """Why the Hub cannot be asked, in a few words; empty if it answers."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return "" if answers(constants.ENDPOINT) else f"{constants.ENDPOINT} cannot be reached"


@functools.cache
def answers(address: str) -> bool:
    """Whether a server answers at all, be it with a refusal; asked once. Proxies of the environment are used."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # a certificate that the Hub's client may know
    except (OSError, http.client.HTTPException):
        return False
