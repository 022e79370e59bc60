from typing import final

from uvsock._poller import Watched

__pyx_capi__: dict[str, object]

@final
class Lingering(Watched): ...
