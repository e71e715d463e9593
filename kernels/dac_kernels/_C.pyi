# ruff: noqa: N999 (the name says that the module is private)
# The compiled module: see csrc/bindings.cpp. Beside the names below it has a function for each op,
# device and dtypes, such as `snake_forward_float32`; native.py calls these by name.

# Columns of a panel of a packed weight.
panel: int
max_windows: int
max_bands: int
max_samples: int
cuda_architectures: str

def cuda_devices() -> int: ...

class SnakeShape:
    def __init__(self, batch: int, rows: int, size: int, channels_last: bool) -> None: ...

class Rows:
    def __init__(self, data: int, batch_stride: int, row_stride: int) -> None: ...

class ConvShape:
    def __init__(
        self,
        batch: int,
        positions: int,
        inputs: int,
        rows: int,
        columns: int,
        taps: int,
        stride: int,
        dilation: int,
        padding: int,
        channels: int,
        crop: int,
    ) -> None: ...

class ConvLayer:
    def __init__(
        self,
        weight: int,
        bias: int,
        alpha: int,
        lengths: int,
        tanh: bool,
        residual: Rows,
        y: Rows,
        snaked: Rows,
    ) -> None: ...

class Signals:
    def __init__(self, count: int, samples: int, stride: int, chunk: int) -> None: ...

class Plan:
    def __init__(
        self,
        batch: int,
        samples: int,
        channels_last: bool,
        windows: list[int],
        edges: list[int],
        tensors: list[int],
    ) -> None: ...

def stft_bands_partial(plan: Plan) -> int: ...
