"""One module a backend; `aim_runtime.engine` finds and loads them."""
