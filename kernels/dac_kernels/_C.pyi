# ruff: noqa: N999 (the name says that the module is private)
# The compiled module: see csrc/bindings.cpp. Beside the names below it has a function for each op,
# device and dtypes, such as `snake_forward_float32`; native.py calls these by name.

max_windows: int
max_bands: int
max_samples: int
cuda_architectures: str

def cuda_devices() -> int: ...

class SnakeShape:
    def __init__(self, batch: int, rows: int, size: int, channels_last: bool) -> None: ...

class Rows:
    def __init__(self, data: int, batch_stride: int, row_stride: int) -> None: ...

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
