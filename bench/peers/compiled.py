"""The known recipe for fast inference with a network of this kind, in plain PyTorch: what an engine has to beat.

Weight norm folded, convolutions as channels-last conv2d, float16, torch.compile, and one CUDA graph around it all.
Nothing here uses dac_fast's kernels or engine. The quantizer stays in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_fast.config import Config
from dac_fast.storage.checkpoint import folded


class Recipe:
    """Encoder, quantizer and decoder as functions of tensors.

    Args:
        config: of the codec.
        state: its state dict, with published keys.
        dtype: of encoder and decoder.
    """

    def __init__(
        self, config: Config, state: dict[str, Tensor], dtype: torch.dtype = torch.float16
    ):
        self.config, self.dtype, self.weights = config, dtype, {}
        for key, tensor in folded(state).items():
            if key.startswith("quantizer.") or key.endswith("alpha"):
                self.weights[key] = tensor.detach().float()
            elif tensor.dim() == 3:
                self.weights[key] = (
                    tensor[:, :, None].to(dtype).contiguous(memory_format=torch.channels_last)
                )
            else:
                self.weights[key] = tensor.to(dtype)

    def encode(self, audio: Tensor) -> Tensor:
        """Audio [B, 1, T] to codes [B, N, F]."""
        x = audio.to(self.dtype)[:, :, None].contiguous(memory_format=torch.channels_last)
        x = self._conv(x, "encoder.block.0", padding=3)
        for i, stride in enumerate(self.config.encoder_rates, start=1):
            name = f"encoder.block.{i}.block"
            for j, dilation in enumerate((1, 3, 9)):
                x = self._unit(x, f"{name}.{j}", dilation)
            x = self._conv(
                self._snake(x, f"{name}.3"), f"{name}.4", stride=stride, padding=-(-stride // 2)
            )
        last = len(self.config.encoder_rates) + 1
        x = self._conv(
            self._snake(x, f"encoder.block.{last}"), f"encoder.block.{last + 1}", padding=1
        )
        return self._quantise(x[:, :, 0].float())

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N, F] to audio [B, 1, F hop]."""
        z = sum(self._entries(i, codes[:, i]) for i in range(codes.shape[1]))
        x = z.to(self.dtype)[:, :, None].contiguous(memory_format=torch.channels_last)
        x = self._conv(x, "decoder.model.0", padding=3)
        for i, stride in enumerate(self.config.decoder_rates, start=1):
            name = f"decoder.model.{i}.block"
            x = self._snake(x, f"{name}.0")
            weight, bias = self.weights[f"{name}.1.weight"], self.weights[f"{name}.1.bias"]
            x = F.conv_transpose2d(x, weight, bias, (1, stride), (0, -(-stride // 2)))
            for j, dilation in enumerate((1, 3, 9), start=2):
                x = self._unit(x, f"{name}.{j}", dilation)
        last = len(self.config.decoder_rates) + 1
        x = self._conv(
            self._snake(x, f"decoder.model.{last}"), f"decoder.model.{last + 1}", padding=3
        )
        return x[:, :, 0].tanh().float()

    def _conv(self, x, name, stride=1, padding=0, dilation=1):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, (1, stride), (0, padding), (1, dilation))

    def _snake(self, x, name):
        alpha = self.weights[f"{name}.alpha"][:, :, None]
        return (x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).square()).to(x.dtype)

    def _unit(self, x, name, dilation):
        y = self._conv(
            self._snake(x, f"{name}.block.0"),
            f"{name}.block.1",
            padding=3 * dilation,
            dilation=dilation,
        )
        return x + self._conv(self._snake(y, f"{name}.block.2"), f"{name}.block.3")

    def _projected(self, x, name):
        return (
            torch.matmul(self.weights[f"{name}.weight"][:, :, 0], x)
            + self.weights[f"{name}.bias"][:, None]
        )

    def _entries(self, stage, codes):
        entries = F.embedding(codes, self.weights[f"quantizer.quantizers.{stage}.codebook.weight"])
        return self._projected(entries.transpose(1, 2), f"quantizer.quantizers.{stage}.out_proj")

    def _quantise(self, residual):
        codes = []
        for i in range(self.config.n_codebooks):
            latent = self._projected(residual, f"quantizer.quantizers.{i}.in_proj")
            entries = F.normalize(self.weights[f"quantizer.quantizers.{i}.codebook.weight"])
            # the nearest of unit vectors has the largest product
            codes.append(
                torch.matmul(F.normalize(latent.transpose(1, 2), dim=2), entries.t()).argmax(2)
            )
            residual = residual - self._entries(i, codes[-1])
        return torch.stack(codes, dim=1)


def compiled(function: Callable[[Tensor], tuple], x: Tensor) -> Callable[[], tuple]:
    """The function compiled for x's shape; on CUDA also captured, warm, as one graph."""
    run = torch.compile(function, dynamic=False)
    if not x.is_cuda:
        return lambda: run(x)
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(static)

    def replay():
        static.copy_(x)
        graph.replay()
        return outputs

    return replay
