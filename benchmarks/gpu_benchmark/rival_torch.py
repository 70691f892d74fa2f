"""A rival: the same network in plain PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_benchmark.bundles import random_network
from gpu_benchmark.request import SETTINGS, repeated, to_host
from gpu_benchmark.sections import Keep

if TYPE_CHECKING:
    from aim_training.model import AiM


def measure_torch(keep: Keep, size: str, batches: tuple[int, ...], repeats: int) -> None:
    """The same network in plain PyTorch, bf16: `AiM.step` and a sampler, each one CUDA graph."""
    import torch

    from aim_training.config import TokenizerConfig
    from aim_training.tokenizer import VQTokenizer

    torch.manual_seed(0)
    network = random_network(size, "cuda").to(torch.bfloat16)
    tokenizer = VQTokenizer(TokenizerConfig()).eval().to("cuda", torch.bfloat16)
    keep(torch=torch.__version__, what="AiM.step and a sampler in CUDA graphs, bf16, state too")
    rows: list[dict[str, Any]] = []
    for images in batches:
        with torch.inference_mode():
            rows.append(torch_row(network, tokenizer, images, repeats))
        keep(rows=rows)
        torch.cuda.empty_cache()


def torch_row(network: AiM, tokenizer: Any, images: int, repeats: int) -> dict[str, Any]:
    """Its figures for one number of images."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    request = TorchRequest(network, images)
    step, draw = captured(request.step), captured(request.draw)
    steps = network.config.num_tokens

    def sampling() -> None:
        request.position.zero_()
        for _ in range(steps):
            step.replay()
            draw.replay()
        torch.cuda.synchronize()

    def stepping() -> None:
        for _ in range(steps):
            step.replay()
        torch.cuda.synchronize()

    def decoding() -> None:
        for chunk in request.tokens.split(16):
            to_host(tokenizer.decode(chunk))

    sampling()
    decoding()
    drawing = statistics.median(repeated(sampling, repeats))
    decode = statistics.median(repeated(decoding, repeats))
    return {
        "images": images,
        "seconds": drawing + decode,
        "step_ms": repeated(stepping, 1)[0] / steps * 1e3,
        "decode_ms_per_image": decode / images * 1e3,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved(),
    }


class TorchRequest:
    """Guided images in the making, in tensors that keep their place, as a CUDA graph needs them.

    The step returns new states, which are copied over the old ones.
    """

    def __init__(self, network: AiM, images: int) -> None:
        import torch

        config, like = network.config, network.backbone.norm_f.weight
        classes = torch.arange(images, device=like.device) % config.num_classes
        classes = torch.cat([classes, torch.full_like(classes, config.num_classes)])  # (R,)
        self.network = network
        self.conditioning = network.prologue(classes)
        self.state = network.init_state(2 * images)
        self.token, self.position = torch.zeros_like(classes), torch.zeros_like(classes)
        self.logits = torch.zeros(2 * images, config.vocab_size, device=like.device)
        self.tokens = classes.new_zeros(images, config.num_tokens)
        self.noise = torch.rand(images, config.num_tokens, device=like.device)

    def step(self) -> None:
        """Scores of the token at `position`."""
        logits, state = self.network.step(
            self.token, self.position, self.conditioning, self.state, 1
        )
        self.logits.copy_(logits)
        for old, new in zip(self.state, state, strict=True):
            old.conv.copy_(new.conv)
            old.ssm.copy_(new.ssm)

    def draw(self) -> None:
        """Guidance, top-k, top-p and a draw; on to the next position."""
        guided, without = self.logits.chunk(2)
        guided = without + SETTINGS["cfg_scale"] * (guided - without)
        best, order = guided.topk(int(SETTINGS["top_k"]))  # (N, k), falling
        chance = best.softmax(-1)
        before = chance.cumsum(-1) - chance
        reached = chance.where(before < SETTINGS["top_p"], 0.0).cumsum(-1)
        at = self.position[: len(self.tokens), None]  # (N, 1)
        goal = self.noise.gather(1, at) * reached[:, -1:]
        place = (reached <= goal).sum(-1, keepdim=True).clamp(max=best.shape[1] - 1)
        drawn = order.gather(1, place)
        self.tokens.scatter_(1, at, drawn)
        self.token.copy_(drawn[:, 0].repeat(2))
        self.position.add_(1).remainder_(self.tokens.shape[1])


def captured(work: Callable[[], None]) -> Any:
    """`work` as a CUDA graph, after two runs of it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
