"""The emulated AWS's HTTP servers: moto behind the front for this host and for machines, and the metadata service."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moto.core.utils import convert_to_flask_response
from moto.ec2.models.core import TaggedEC2Resource
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from tests.cloudbox.network import run
from tests.clouds.aws.cloud import add_parameters
from tests.clouds.aws.ec2 import Ec2
from tests.clouds.aws.front import Front
from tests.clouds.aws.metadata import Metadata

if TYPE_CHECKING:
    from tests.clouds.aws.cloud import AwsCloud

_METADATA = "169.254.169.254"


class Servers:
    """All servers of one cloud, which listen when this is made."""

    def __init__(self, cloud: AwsCloud) -> None:
        moto_api_backend.reset()
        TaggedEC2Resource.get_tags = _tags  # type: ignore[method-assign]
        self._running: list[tuple[BaseWSGIServer, threading.Thread]] = []
        front = Front(cloud, _Moto(cloud))
        self.url = self._serve("127.0.0.1", front)
        self.url_for_machines = self.metadata_url = None
        self._table = ""
        network = cloud.rack.network
        if network is not None:
            self.url_for_machines = self._serve(network.gateway, front)
            self.metadata_url = self._serve(network.gateway, Metadata(cloud))
            self._table = f"{network.name}_metadata"
            self._remove_table()
            place = self.metadata_url.removeprefix("http://")
            run("nft", "-f", "-", text=_rules(self._table, network.name, place))

    def _serve(self, host: str, application: Callable[..., Any]) -> str:
        server = make_server(host, 0, application, threaded=True, request_handler=_Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name=f"aws-{host}", daemon=True)
        thread.start()
        self._running.append((server, thread))
        return f"http://{host}:{server.server_port}"

    def close(self) -> None:
        for server, thread in self._running:
            server.shutdown()
            thread.join()
            server.server_close()
        self._running.clear()
        self._remove_table()
        moto_api_backend.reset()

    def _remove_table(self) -> None:
        if self._table:
            subprocess.run(["nft", "delete", "table", "ip", self._table], capture_output=True)


def _rules(table: str, bridge: str, place: str) -> str:
    return f"""
    table ip {table} {{
        chain in {{
            type nat hook prerouting priority dstnat;
            iifname "{bridge}" ip daddr {_METADATA} tcp dport 80 dnat to {place}
        }}
    }}
    """


class _Handler(MotoRequestHandler):
    """Says nothing of each request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class _Moto(DomainDispatcherApplication):
    """moto's server with our EC2."""

    def __init__(self, cloud: AwsCloud) -> None:
        super().__init__(self._create)
        self._ec2 = type("BoundEc2", (Ec2,), {"cloud": cloud})
        self._with_parameters: set[str] = set()

    def _create(self, service: Any) -> Any:
        app = create_backend_app(service)
        if service == "ec2":
            view = convert_to_flask_response(self._ec2.dispatch)
            app.view_functions = dict.fromkeys(app.view_functions, view)
        return app

    def infer_service_region_host(self, environ: dict[str, Any], path: str) -> str | None:
        host = super().infer_service_region_host(environ, path)
        if host is not None and host.startswith("ssm.") and host not in self._with_parameters:
            self._with_parameters.add(host)
            add_parameters(host.split(".")[1])
        return host


def _tags(self: Any) -> list[dict[str, str]]:
    """Do what moto's own method does by looking at the tags of all that there is, which takes long for many."""
    return [{"resource_id": self.id, "key": k, "value": v} for k, v in self.ec2_backend.tags.get(self.id, {}).items()]
