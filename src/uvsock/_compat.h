/* Where Linux and macOS differ. */
#ifndef UVSOCK_COMPAT_H
#define UVSOCK_COMPAT_H

#include <sys/socket.h>

/* macOS has no MSG_NOSIGNAL; libuv sets SO_NOSIGPIPE on every stream socket it opens there. */
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* macOS names the idle time before the first keep-alive probe differently. */
#ifndef TCP_KEEPIDLE
#ifdef TCP_KEEPALIVE
#define TCP_KEEPIDLE TCP_KEEPALIVE
#endif
#endif

/* The address of a peer that is gone, which getpeername(2) refuses. Linux only. */
#ifndef SO_PEERNAME
#define SO_PEERNAME -1
#endif

#endif
