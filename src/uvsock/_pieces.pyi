from typing import final

@final
class Pieces: ...
