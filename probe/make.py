"""Copies of the kernels as of main and of this branch's variants, as modules k_NAME_*."""
import re, subprocess
MODULES = ("warp_scan", "warp_states", "warp_tokens", "warp_fragments", "warp_bulk")
def write(name, read, change=lambda m, t: t):
    for m in MODULES:
        t = read(m)
        if t is None: continue
        for n in MODULES:
            t = t.replace(f"aim_export.cuda.kernels.{n} ", f"k_{name}_{n} ")
        open(f"k_{name}_{m}.py", "w").write(change(m, t))
def of_git(rev):
    def read(m):
        r = subprocess.run(["git", "show", f"{rev}:export/cuda/kernels/{m}.py"], capture_output=True, text=True)
        return r.stdout if r.returncode == 0 else None
    return read
def of_tree(m):
    return open(f"../export/cuda/kernels/{m}.py").read()
def padded(m, t):
    if m != "warp_scan": return t
    t = t.replace("    OVERLAPS: gl.constexpr,\n):\n    \"\"\"One token", "    PAD: gl.constexpr,\n    OVERLAPS: gl.constexpr,\n):\n    \"\"\"One token")
    a = t.index('    """One token'); b = t.index("\n", a) + 1
    t = t[:b] + "    if PAD > 0:\n        padding = gl.allocate_shared_memory(gl.float32, [PAD, 256], _LINE)\n" + t[b:]
    return t.rstrip("\n") + "\n    if PAD > 0:\n        padding._keep_alive()\n"
def weak(m, t):
    return t.replace(", volatile=True", "")
write("present", of_git("main"), padded)
write("new", of_tree, padded)
write("weak", of_tree, lambda m, t: padded(m, weak(m, t)))
