import asyncio
from typing import final

from typing_extensions import disjoint_base

@disjoint_base
class Watched: ...

@final
class Poller:
    def __new__(cls, loop: asyncio.AbstractEventLoop) -> Poller: ...
