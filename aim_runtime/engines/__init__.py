"""One module a backend; `aim_runtime.engines.backends` finds and loads them."""
