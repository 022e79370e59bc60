import ssl
from typing import final

@final
class TLSLayer:
    def __new__(
        cls, context: ssl.SSLContext, server_side: bool, server_hostname: str | None
    ) -> TLSLayer: ...
    @property
    def sslobj(self) -> ssl.SSLObject: ...
