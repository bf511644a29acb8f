"""Tell a Prefect server what flows may wait for."""

from __future__ import annotations

import sys

DATA_CHANGED = "lexiseg.data.changed"


def announce_data(name: str) -> bool:
    """Emit the event `lexiseg.data.changed` for the resource `lexiseg.data.NAME`, where a Prefect server is set.

    A server that cannot be reached is told of on stderr and is no error: the data is recorded all the same.

    Returns:
        Whether a server took it.
    """
    import httpx
    from prefect import get_client
    from prefect.events.schemas.events import Event, Resource
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return False
    resource = Resource({"prefect.resource.id": f"lexiseg.data.{name}", "prefect.resource.name": f"data/{name}"})
    event = Event(event=DATA_CHANGED, resource=resource)
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        print(f"note: Prefect at {PREFECT_API_URL.value()} was not told of it ({error})", file=sys.stderr)
        return False
    return True
