"""The ResNet that several sources share but for names: stride in the 3x3 convolution, GroupNorm(32)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Conv = Callable[..., nn.Module]


class Bottleneck(nn.Module):
    """Norms are ``bn1`` to ``bn3`` or ``gn1`` to ``gn3``, as `norm` says."""

    def __init__(
        self, conv: Conv, norm: str, channels: int, width: int, out: int, *, stride: int, dilation: int, groups: int
    ) -> None:
        super().__init__()
        self.norm = norm
        shapes = [
            (channels, width, {"kernel_size": 1}),
            (width, width, {"kernel_size": 3, "stride": stride, "padding": dilation, "dilation": dilation}),
            (width, out, {"kernel_size": 1}),
        ]
        shapes[1][2]["groups"] = groups
        for index, (fan_in, fan_out, rest) in enumerate(shapes, 1):
            self.add_module(f"conv{index}", conv(fan_in, fan_out, bias=False, **rest))
            self.add_module(f"{norm}{index}", nn.GroupNorm(32, fan_out))
        self.downsample: nn.Module | None = None
        if channels != out or stride != 1:
            shortcut = conv(channels, out, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.GroupNorm(32, out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in (1, 2, 3):
            y = self.get_submodule(f"{self.norm}{index}")(self.get_submodule(f"conv{index}")(y))
            y = F.relu(y) if index < 3 else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Stem(nn.Module):
    def __init__(self, conv: Conv, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = conv(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.add_module(f"{norm}1", nn.GroupNorm(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.get_submodule(f"{self.norm}1")(self.conv1(x)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def add_stages(
    network: nn.Module, conv: Conv, norm: str, depth: int, *, groups: int = 1, dilated: bool = False
) -> None:
    """``layer1`` to ``layer4``; 32 groups are of 4 channels in the first stage. If `dilated`, the last stage keeps the
    resolution and its blocks but the first have dilation 2.
    """
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width, out = (64 if groups == 1 else 128) * 2**stage, 256 * 2**stage
        keeps = stage == 0 or (dilated and stage == 3)
        layers = []
        for block in range(blocks):
            stride = 1 if keeps or block else 2
            dilation = 2 if dilated and stage == 3 and block else 1
            layers.append(Bottleneck(conv, norm, channels, width, out, stride=stride, dilation=dilation, groups=groups))
            channels = out
        network.add_module(f"layer{stage + 1}", nn.Sequential(*layers))


def stages_of(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What each of the four stages makes of the stem's output."""
    results = []
    for stage in range(1, 5):
        x = network.get_submodule(f"layer{stage}")(x)
        results.append(x)
    return results


class ResNet(Stem):
    """Stem and stages side by side; gives the results of the four stages."""

    def __init__(self, conv: Conv, norm: str, depth: int, *, groups: int = 1, dilated: bool = False) -> None:
        super().__init__(conv, norm)
        add_stages(self, conv, norm, depth, groups=groups, dilated=dilated)

    def forward(self, x: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return stages_of(self, super().forward(x))
