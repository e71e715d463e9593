"""Ctrl-C and SIGTERM in the middle of many files."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """SIGINT or SIGTERM has come; its number is the argument."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Stop:
    """Within the `with` block, the first SIGINT or SIGTERM raises `Stopped`.

    So what is half done is tidied up. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)
        # What a callback of libsndfile raises is lost; `check` raises it then.
        while frame is not None:
            if frame.f_globals.get("__name__") == "soundfile":
                return
            frame = frame.f_back
        raise Stopped(number)

    def check(self) -> None:
        """Raises `Stopped` where a signal has come; to be called now and then."""
        if self._received:
            raise Stopped(self._received)
