"""A bundle as a static web site: the browser of whoever opens it draws, and no server does.

`write_site` puts one together from a bundle, the page's modules (`page/`, with those of
`aim_serve` that it shares), the engine's (`engine/`), the service worker (`service_worker/`) and
the files of npm's onnxruntime-web that `Package` finds or fetches. `Site` reads one back and
`listening` shows it to the browsers of this machine.
"""

from aim_web.local_server import listening
from aim_web.onnxruntime_web import Package
from aim_web.site import Site, write_site

__all__ = ["Package", "Site", "listening", "write_site"]
