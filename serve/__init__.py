"""Serve one bundle over HTTP: OpenAI's images API, a stream of events, and a page to try it.

`aim_serve.service.Service` holds what draws, `aim_serve.app.create_app` makes the ASGI application
of it, `aim_serve.server.run` is the process around both that `aim serve` starts. An application
neither opens nor closes its service, so that another server can hold both.
"""
