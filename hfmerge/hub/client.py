"""Calls of the Hub: one client, errors as one line each, and retries after temporary faults."""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hfmerge.errors import AccessError, HfMergeError, NotFoundError, OfflineError, SourceError


_T = TypeVar("_T")
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""


@dataclass(frozen=True)
class Patience:
    """Limits on retries: number of tries and waits between them; times in seconds.

    Attributes:
        tries: number of consecutive requests without progress after which the call fails.
        first: longest wait after the first failure. It doubles with each further failure.
        longest: upper bound of a wait.
        longest_retry_after: longest wait that a Hub may ask for (`Retry-After`). If it asks for more, the call fails.
        whole: no try begins later than this after the first one.
    """

    tries: int = 6
    first: float = 0.5
    longest: float = 10.0
    longest_retry_after: float = 320.0
    whole: float = 120.0

    def wait(self, failures: int, retry_after: float | None = None) -> float:
        """Seconds to wait after so many failures in a row; a random share of it is left out, so that many clients of
        a Hub that fails do not all come back at the same moment.
        """
        if retry_after is not None:
            return retry_after + random.uniform(0.0, self.first)
        return float(min(self.longest, self.first * 2 ** (failures - 1))) * random.uniform(0.5, 1.0)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait, by `Retry-After` (a number or a date) or the Hub's `RateLimit`."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = next((value.strip() for key, value in headers.items() if key.lower() == "retry-after"), "")
    if text.isdigit():
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text) if text else None
    except ValueError:
        return None  # neither a number nor a date: the header asks for no wait
    return max(0.0, moment.timestamp() - time.time()) if moment is not None else None


def patiently(work: Callable[[], _T], patience: Patience | None = None) -> _T:
    """Call `work`, and call it again after temporary faults: 429, 5xx, timeouts, cut connections.

    Without any connection there is no second try: the caller then uses the cache or fails.
    """
    patience = patience or Patience()
    start, failures = time.monotonic(), 0
    while True:
        try:
            return work()
        except Exception as error:  # whatever does not pass is raised again
            failures += 1
            wait = pause_after(error, failures, patience)
            late = time.monotonic() - start > patience.whole
            if wait is None or late or failures >= patience.tries:
                raise
        time.sleep(wait)


def pause_after(error: BaseException, failures: int, patience: Patience) -> float | None:
    """Seconds to wait before the next try after so many failures, None if another would end the same way."""
    import httpx2

    lasting = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            retry_after = asked_wait(response.headers)
            passes = response.status_code in PASSING and (
                retry_after is None or retry_after <= patience.longest_retry_after
            )
            return patience.wait(failures, retry_after) if passes else None
        if isinstance(cause, lasting):
            return None
        # an error page where JSON was expected, which the client does not look at
        if isinstance(cause, httpx2.TransportError | json.JSONDecodeError):
            return patience.wait(failures)
    return None


def hub_api() -> Any:
    """An `HfApi` that names hfmerge in its requests. The token comes from the environment."""
    from huggingface_hub import HfApi

    from hfmerge.version import __version__

    return HfApi(library_name="hfmerge", library_version=__version__)


@contextlib.contextmanager
def hub_errors(subject: str, right: str = "read") -> Iterator[None]:
    """Re-raise what the Hub client raises as one line that names `subject` and the remedy.

    Args:
        right: the right that the token needs, "read" or "write".
    """
    import httpx2
    from huggingface_hub import errors as hf

    token = f"pass a token that may {right} it: `hf auth login`, or HF_TOKEN"
    try:
        yield
    except HfMergeError:
        raise
    except hf.GatedRepoError as error:
        raise AccessError(f"{subject}: gated; ask for access on its page, then {token}.") from error
    except hf.RepositoryNotFoundError as error:
        raise NotFoundError(f"{subject}: no such repository, or a private one; check the ID, or {token}.") from error
    except hf.RevisionNotFoundError as error:
        raise NotFoundError(f"{subject}: no such branch, tag or commit in this repository.") from error
    except (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError, hf.RevisionResolutionError) as error:
        if (status := status_of(error)) in (401, 403):
            raise AccessError(f"{subject}: the Hub refused the token (HTTP {status}); {token}.") from error
        raise OfflineError(
            f"{subject}: not in the local cache and the Hub cannot be reached; run once online, or unset "
            "HF_HUB_OFFLINE."
        ) from error
    except hf.EntryNotFoundError as error:
        raise NotFoundError(f"{subject}: no such file at this revision.") from error
    except hf.HfHubHTTPError as error:
        status = status_of(error)
        if status in (401, 403):
            raise AccessError(f"{subject}: the Hub refused the token (HTTP {status}); {token}.") from error
        detail = " ".join((error.server_message or str(error)).split())
        again = "; try again later" if status in PASSING else ""
        raise SourceError(f"{subject}: the Hub answered HTTP {status}: {detail}{again}") from error
    except RuntimeError as error:
        # the client's word for an upload that failed, whatever failed it
        if (status := status_of(error)) is None and not any(isinstance(c, httpx2.HTTPError) for c in causes(error)):
            raise
        what = f"HTTP {status}" if status is not None else "no answer"
        raise SourceError(f"{subject}: {str(error).splitlines()[0]} ({what}); try again later.") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{subject}: the Hub answered something that is not JSON; try again later.") from error
    except (httpx2.TransportError, ConnectionError) as error:
        raise OfflineError(f"{subject}: the Hub cannot be reached ({type(error).__name__}); try again.") from error


def status_of(error: BaseException) -> int | None:
    """HTTP status of an error or of what caused it."""
    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, ..."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
